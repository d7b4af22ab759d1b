/* What busybox has no program for: datagrams to groups, and Ethernet frames of one's own making.
 *
 *   hear INTERFACE ADDRESS PORT        prints "ready", then "FROM TEXT" for each datagram to ADDRESS
 *   say INTERFACE ADDRESS PORT TEXT    sends one
 *   forge INTERFACE COUNT TO [FROM]    sends frames that nobody asked for, from addresses made up
 */
#include <arpa/inet.h>
#include <err.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct sockaddr_storage address(const char *text, const char *port, unsigned interface) {
    struct sockaddr_storage made = {0};
    struct sockaddr_in *four = (void *)&made;
    struct sockaddr_in6 *six = (void *)&made;
    if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons(atoi(port));
    } else if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(atoi(port));
        six->sin6_scope_id = interface;
    } else {
        errx(2, "no address: %s", text);
    }
    return made;
}

static int udp(const struct sockaddr_storage *at, unsigned interface, int hear) {
    int sock = socket(at->ss_family, SOCK_DGRAM, 0), on = 1;
    if (sock < 0) err(1, "socket");
    if (at->ss_family == AF_INET) {
        struct in_addr group = ((const struct sockaddr_in *)at)->sin_addr;
        struct ip_mreqn wanted = {.imr_multiaddr = group, .imr_ifindex = (int)interface};
        if (!IN_MULTICAST(ntohl(group.s_addr))) return sock;
        if (setsockopt(sock, IPPROTO_IP, hear ? IP_ADD_MEMBERSHIP : IP_MULTICAST_IF, &wanted,
                       sizeof wanted)) err(1, "multicast");
    } else {
        struct in6_addr group = ((const struct sockaddr_in6 *)at)->sin6_addr;
        struct ipv6_mreq wanted = {.ipv6mr_multiaddr = group, .ipv6mr_interface = interface};
        setsockopt(sock, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
        if (!IN6_IS_ADDR_MULTICAST(&group)) return sock;
        if (hear ? setsockopt(sock, IPPROTO_IPV6, IPV6_JOIN_GROUP, &wanted, sizeof wanted)
                 : setsockopt(sock, IPPROTO_IPV6, IPV6_MULTICAST_IF, &interface, sizeof interface))
            err(1, "multicast");
    }
    return sock;
}

static void hear(int sock, const struct sockaddr_storage *at) {
    if (bind(sock, (const void *)at, sizeof *at)) err(1, "bind");
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    for (;;) {
        char text[2048], from[INET6_ADDRSTRLEN];
        struct sockaddr_storage peer;
        socklen_t length = sizeof peer;
        ssize_t got = recvfrom(sock, text, sizeof text, 0, (void *)&peer, &length);
        if (got < 0) err(1, "recvfrom");
        inet_ntop(peer.ss_family,
                  peer.ss_family == AF_INET ? (void *)&((struct sockaddr_in *)&peer)->sin_addr
                                            : (void *)&((struct sockaddr_in6 *)&peer)->sin6_addr,
                  from, sizeof from);
        printf("%s %.*s\n", from, (int)got, text);
    }
}

static void mac(unsigned char *into, const char *text) {
    unsigned byte[6];
    if (sscanf(text, "%x:%x:%x:%x:%x:%x", byte, byte + 1, byte + 2, byte + 3, byte + 4,
               byte + 5) != 6) errx(2, "no Ethernet address: %s", text);
    for (int at = 0; at < 6; at++) into[at] = (unsigned char)byte[at];
}

static void forge(unsigned interface, int count, const char *to, const char *from) {
    struct sockaddr_ll out = {.sll_family = AF_PACKET, .sll_ifindex = (int)interface, .sll_halen = 6};
    unsigned char frame[1400] = {0};
    int sock = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    if (sock < 0) err(1, "packet socket");
    mac(frame, to);
    frame[12] = 0x88; /* "local experimental" (IEEE 802, 9.2.3) */
    frame[13] = 0xb5;
    strcpy((char *)frame + 14, "forged");
    for (int number = 0; number < count; number++) {
        if (from) {
            mac(frame + 6, from);
        } else {
            frame[6] = 0x0a;
            memcpy(frame + 7, &number, sizeof number);
        }
        if (sendto(sock, frame, sizeof frame, 0, (void *)&out, sizeof out) < 0) usleep(1000);
    }
}

int main(int argc, char **argv) {
    if (argc < 5) errx(2, "usage: see the source");
    unsigned interface = if_nametoindex(argv[2]);
    if (!interface) err(1, "%s", argv[2]);
    if (!strcmp(argv[1], "forge")) {
        forge(interface, atoi(argv[3]), argv[4], argc > 5 ? argv[5] : NULL);
        return 0;
    }
    struct sockaddr_storage at = address(argv[3], argv[4], interface);
    int hears = !strcmp(argv[1], "hear"), sock = udp(&at, interface, hears);
    if (hears) hear(sock, &at);
    if (argc < 6) errx(2, "nothing to say");
    if (sendto(sock, argv[5], strlen(argv[5]), 0, (void *)&at,
               at.ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6)) < 0)
        err(1, "sendto");
    return 0;
}
