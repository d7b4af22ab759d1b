/*
 * An interface's addresses: what was there goes, what is asked for comes, the interface goes up (and
 * down again where it has no address: it is ready then, and its connections are over), and a default
 * route is set where a gateway is named.
 *
 * An interface is named, or found by its Ethernet address: a guest may call its cards as it likes.
 * What went wrong first is kept in `trouble`, and nothing is asked of the kernel after it.
 */
#include "agent.h"

#include <linux/if_addr.h>
#include <net/if_arp.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAC_SIZE = 6, MAC_TEXT = 17, LINK_LOCAL_PREFIX = 64 };

/* <linux/if.h>, which does not go with <net/if.h>: there is a carrier. */
enum { LOWER_UP = 0x10000 };

/* A carrier is taken note of within a second (net/core/link_watch.c), mostly at once. */
enum { YIELDS = 4, PATIENT_TRIES = 2000, TRIES = 20, READY_INTERVAL_US = 1000 };

/* Nearly every card is among the first so many; to ask for all of them costs more. */
enum { NEAR = 32 };

struct message {
    struct nlmsghdr header;
    union {
        struct ifaddrmsg address;
        struct rtmsg route;
        struct ifinfomsg link;
        unsigned char bytes[256];
    } body;
};

static int netlink;
static const char *device;
static struct refusal trouble;

/* What a card that was given another Ethernet address calls itself by the former one, and by its own. */
static struct {
    bool differ;
    unsigned char former[16], own[16];
} link_local;

static void trouble_is(int error)
{
    if (!trouble.error)
        trouble = (struct refusal){error, device};
}

static void prepare(struct message *m, int type, int flags, size_t body)
{
    memset(m, 0, sizeof *m);
    m->header.nlmsg_type = (uint16_t)type;
    m->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags);
    m->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(body);
}

static void attach(struct message *m, int type, const void *data, size_t length)
{
    struct rtattr *attribute = (void *)((unsigned char *)m + NLMSG_ALIGN(m->header.nlmsg_len));
    attribute->rta_type = (uint16_t)type;
    attribute->rta_len = (uint16_t)RTA_LENGTH(length);
    memcpy(RTA_DATA(attribute), data, length);
    m->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(m->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len));
}

static void ask(struct message *m, int tolerated)
{
    struct {
        struct nlmsghdr header;
        struct nlmsgerr error;
        unsigned char more[512];
    } answer;
    if (trouble.error)
        return;
    if (send(netlink, m, m->header.nlmsg_len, 0) < 0 || recv(netlink, &answer, sizeof answer, 0) < 0)
        trouble_is(errno);
    else if (answer.header.nlmsg_type == NLMSG_ERROR && answer.error.error && -answer.error.error != tolerated)
        trouble_is(-answer.error.error);
}

/* RFC 4291, appendix A: what the kernel makes of it. */
static void link_local_by(const unsigned char mac[MAC_SIZE], unsigned char address[16])
{
    const unsigned char made[16] = {0xfe,   0x80,   0,    0,    0,      0,      0,     0,
                                    mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]};
    memcpy(address, made, sizeof made);
}

static bool is_former_link_local(const struct ifaddrmsg *address, size_t rest)
{
    if (!link_local.differ || address->ifa_family != AF_INET6)
        return false;
    for (struct rtattr *a = IFA_RTA(address); RTA_OK(a, rest); a = RTA_NEXT(a, rest))
        if (a->rta_type == IFA_ADDRESS && RTA_PAYLOAD(a) == 16)
            return memcmp(RTA_DATA(a), link_local.former, 16) == 0;
    return false;
}

/*
 * A link-local address stays: the kernel made it, and neighbour discovery needs it. But for one by an
 * Ethernet address that the card has no more: a twin's.
 */
static size_t collect(unsigned int index, struct message *found, size_t room)
{
    static unsigned char dump[65536];
    struct message m;
    size_t count = 0;
    prepare(&m, RTM_GETADDR, NLM_F_DUMP, sizeof m.body.address);
    bool asked = !trouble.error && send(netlink, &m, m.header.nlmsg_len, 0) >= 0;
    for (;;) {
        ssize_t got = asked ? recv(netlink, dump, sizeof dump, 0) : -1;
        if (got < 0) {
            trouble_is(errno);
            return 0;
        }
        size_t left = (size_t)got;
        for (struct nlmsghdr *h = (void *)dump; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR)
                return count;
            struct ifaddrmsg *address = NLMSG_DATA(h);
            bool stays = address->ifa_scope == RT_SCOPE_LINK && !is_former_link_local(address, IFA_PAYLOAD(h));
            if (address->ifa_index != index || stays || count == room)
                continue;
            prepare(&found[count], RTM_DELADDR, 0, sizeof *address);
            found[count].body.address = *address;
            size_t rest = IFA_PAYLOAD(h);
            for (struct rtattr *a = IFA_RTA(address); RTA_OK(a, rest); a = RTA_NEXT(a, rest))
                if ((a->rta_type == IFA_LOCAL || a->rta_type == IFA_ADDRESS) && RTA_PAYLOAD(a) <= 16)
                    attach(&found[count], a->rta_type, RTA_DATA(a), RTA_PAYLOAD(a));
            count++;
        }
    }
}

/* 4 or 16 bytes. */
static size_t read_address(struct reader *r, unsigned char bytes[16])
{
    uint8_t length = read_u8(r);
    if (length != 4 && length != 16)
        r->bad = true;
    for (uint8_t i = 0; !r->bad && i < length; i++)
        bytes[i] = read_u8(r);
    return r->bad ? 0 : length;
}

static void add_address(unsigned int index, const unsigned char *bytes, size_t length, uint8_t prefix)
{
    struct message m;
    prepare(&m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof m.body.address);
    m.body.address.ifa_family = length == 4 ? AF_INET : AF_INET6;
    m.body.address.ifa_prefixlen = prefix;
    m.body.address.ifa_index = index;
    m.body.address.ifa_flags = length == 16 ? IFA_F_NODAD : 0; /* ours alone: no second of waiting */
    attach(&m, IFA_LOCAL, bytes, length);
    attach(&m, IFA_ADDRESS, bytes, length);
    ask(&m, 0);
}

/* What they leave goes before them: a connection that ends says so to its peer. */
static void remove_remains(struct message *found, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct rtattr *a = (void *)((unsigned char *)&found[i] + NLMSG_LENGTH(sizeof found[i].body.address));
        size_t left = found[i].header.nlmsg_len - NLMSG_LENGTH(sizeof found[i].body.address);
        for (; RTA_OK(a, left); a = RTA_NEXT(a, left)) /* IPv4's IFA_ADDRESS may be a peer's */
            if (a->rta_type == IFA_LOCAL || found[i].body.address.ifa_family == AF_INET6)
                remains_end_connections(RTA_DATA(a), RTA_PAYLOAD(a));
    }
    if (count > 0)
        remains_forget_peers();
}

/* The kernel makes a link-local address when an interface goes up, and none for one that is up. */
static void remove_addresses(unsigned int index, bool for_good)
{
    static struct message found[64];
    size_t count = collect(index, found, sizeof found / sizeof *found);
    if (for_good)
        remove_remains(found, count);
    for (size_t i = 0; i < count; i++) {
        ask(&found[i], EADDRNOTAVAIL); /* a secondary address goes with its primary */
        if (found[i].body.address.ifa_scope == RT_SCOPE_LINK)
            add_address(index, link_local.own, sizeof link_local.own, LINK_LOCAL_PREFIX);
    }
}

/*
 * Of an interface itself by ioctl (netdevice(7)), for which any socket will do: rtnetlink is thousands
 * of instructions more that a restored guest has never run, and its emulator must translate.
 */
static bool control(unsigned long request, struct ifreq *card)
{
    bool done = !trouble.error && ioctl(netlink, request, card) == 0;
    if (!done)
        trouble_is(errno);
    return done;
}

static struct ifreq card_of(unsigned int index)
{
    struct ifreq card = {.ifr_ifindex = (int)index};
    control(SIOCGIFNAME, &card);
    return card;
}

static void raise_or_lower(unsigned int index, bool up)
{
    struct ifreq card = card_of(index);
    control(SIOCGIFFLAGS, &card);
    card.ifr_flags = (short)(up ? card.ifr_flags | IFF_UP : card.ifr_flags & ~IFF_UP);
    control(SIOCSIFFLAGS, &card);
}

static bool is_running(unsigned int index)
{
    struct ifreq card = card_of(index);
    return control(SIOCGIFFLAGS, &card) && card.ifr_flags & IFF_RUNNING;
}

static unsigned int flags_of(unsigned int index)
{
    static unsigned char answer[65536];
    struct message m;
    struct nlmsghdr *header = (void *)answer;
    prepare(&m, RTM_GETLINK, 0, sizeof m.body.link);
    m.header.nlmsg_flags = NLM_F_REQUEST; /* the answer is answer enough */
    m.body.link.ifi_index = (int)index;
    if (trouble.error)
        return 0;
    if (send(netlink, &m, m.header.nlmsg_len, 0) < 0 || recv(netlink, answer, sizeof answer, 0) < 0)
        trouble_is(errno);
    else if (header->nlmsg_type != RTM_NEWLINK)
        trouble_is(EPROTO);
    return trouble.error ? 0 : ((struct ifinfomsg *)NLMSG_DATA(header))->ifi_flags;
}

/* Until then nothing can be sent by IPv6; one that has no carrier is not waited for. */
static void wait_ready(unsigned int index, bool patiently)
{
    for (int left = YIELDS; left > 0; left--) {
        if (is_running(index))
            return;
        sched_yield();
    }
    for (int left = patiently ? PATIENT_TRIES : TRIES; left > 0; left--) {
        if ((flags_of(index) & (LOWER_UP | IFF_RUNNING)) != LOWER_UP)
            return;
        usleep(READY_INTERVAL_US);
    }
    if (!patiently)
        trouble_is(EAGAIN);
}

static void add_default_route(unsigned int index, const unsigned char *gateway, size_t length)
{
    struct message m;
    prepare(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof m.body.route);
    m.body.route.rtm_family = length == 4 ? AF_INET : AF_INET6;
    m.body.route.rtm_table = RT_TABLE_MAIN;
    m.body.route.rtm_protocol = RTPROT_STATIC;
    m.body.route.rtm_type = RTN_UNICAST;
    m.body.route.rtm_flags = RTNH_F_ONLINK; /* a card that has no carrier yet has no route to its own network */
    attach(&m, RTA_GATEWAY, gateway, length);
    attach(&m, RTA_OIF, &index, sizeof index);
    ask(&m, 0);
}

static bool read_mac(const char *text, unsigned char mac[MAC_SIZE])
{
    unsigned int parts[MAC_SIZE];
    if (strlen(text) < MAC_TEXT)
        return false;
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x", &parts[0], &parts[1], &parts[2], &parts[3], &parts[4], &parts[5]) !=
        MAC_SIZE)
        return false;
    for (int i = 0; i < MAC_SIZE; i++)
        mac[i] = (unsigned char)parts[i];
    return true;
}

static bool has_mac(unsigned int index, const unsigned char mac[MAC_SIZE])
{
    struct ifreq request = {.ifr_ifindex = (int)index};
    return ioctl(netlink, SIOCGIFNAME, &request) == 0 && ioctl(netlink, SIOCGIFHWADDR, &request) == 0 &&
           request.ifr_hwaddr.sa_family == ARPHRD_ETHER && memcmp(request.ifr_hwaddr.sa_data, mac, MAC_SIZE) == 0;
}

static unsigned int near_index_of(const unsigned char mac[MAC_SIZE])
{
    for (unsigned int index = 1; index <= NEAR; index++)
        if (has_mac(index, mac))
            return index;
    return 0;
}

static unsigned int far_index_of(const unsigned char mac[MAC_SIZE])
{
    unsigned int found = 0;
    struct if_nameindex *all = if_nameindex();
    for (struct if_nameindex *one = all; one && one->if_index && !found; one++)
        if (one->if_index > NEAR && has_mac(one->if_index, mac))
            found = one->if_index;
    if_freenameindex(all);
    return found;
}

static void set_mac(unsigned int index, const unsigned char mac[MAC_SIZE])
{
    struct ifreq card = card_of(index);
    card.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(card.ifr_hwaddr.sa_data, mac, MAC_SIZE);
    control(SIOCSIFHWADDR, &card);
}

/* By name, by Ethernet address, or as "OLD,NEW": the card that has NEW, or has OLD and gets NEW. */
static unsigned int find_interface(const char *interface)
{
    unsigned char old[MAC_SIZE], new[MAC_SIZE];
    if (!read_mac(interface, old))
        return if_nametoindex(interface);
    bool both = interface[MAC_TEXT] == ',';
    if (both && !read_mac(interface + MAC_TEXT + 1, new))
        return 0;
    unsigned int index = both ? near_index_of(new) : 0, former = index ? 0 : near_index_of(old);
    if (!index && !former && both)
        index = far_index_of(new);
    if (!index && !former)
        former = far_index_of(old);
    link_local.differ = former && both;
    if (link_local.differ) {
        link_local_by(old, link_local.former);
        link_local_by(new, link_local.own);
        set_mac(former, new);
    }
    return index ? index : former;
}

static void change(unsigned int index, struct reader *r, bool patiently)
{
    unsigned char bytes[16];
    uint8_t addresses = read_u8(r);
    remove_addresses(index, addresses == 0);
    for (uint8_t left = addresses; left > 0 && !r->bad; left--) {
        size_t length = read_address(r, bytes);
        uint8_t prefix = read_u8(r);
        if (!r->bad)
            add_address(index, bytes, length, prefix);
    }
    raise_or_lower(index, true);
    wait_ready(index, patiently);
    if (addresses == 0)
        raise_or_lower(index, false);
    for (uint8_t left = read_u8(r); left > 0 && !r->bad; left--) {
        size_t length = read_address(r, bytes);
        device = "a default route";
        if (length)
            add_default_route(index, bytes, length);
    }
    if (r->bad)
        trouble_is(EINVAL);
}

/*
 * What follows the interface's name: u8 count, then as often (address, u8 prefix length); u8 count,
 * then as often a gateway. Its carrier is waited for `patiently`, by a child, or for a moment: EAGAIN.
 */
struct refusal machine_set_addresses(const char *interface, struct reader *r, bool patiently)
{
    trouble = (struct refusal){0, ""};
    link_local.differ = false;
    device = interface;
    netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (netlink < 0) {
        trouble_is(errno);
        return trouble;
    }
    unsigned int index = find_interface(interface);
    if (index)
        change(index, r, patiently);
    else
        trouble_is(ENODEV);
    close(netlink);
    return trouble;
}
