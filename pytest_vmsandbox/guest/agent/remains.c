/*
 * What an address leaves in the kernel when it goes for good: connections, which nobody would hear
 * of again, and what TCP has learned of its peers (runs in a child).
 *
 * Both as far as the guest's kernel can: to end connections takes tcp_diag and udp_diag, with
 * CONFIG_INET_DIAG_DESTROY (Linux 4.5). One that can't leaves them to their timers.
 */
#include "agent.h"

#include <linux/genetlink.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/tcp_metrics.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

/* As many as are ended between two looks; who makes them faster than that keeps some. */
enum { AT_ONCE = 64, LOOKS = 64 };

struct wish {
    struct nlmsghdr header;
    struct inet_diag_req_v2 body;
};

static unsigned char answers[32768];

/* 0, or the error; -1 where there is no answer to be had. */
static int ask(int fd, const struct nlmsghdr *question)
{
    struct nlmsghdr *answer = (void *)answers;
    if (send(fd, question, question->nlmsg_len, 0) < 0)
        return -1;
    ssize_t got = recv(fd, answers, sizeof answers, 0);
    if (got < 0 || !NLMSG_OK(answer, (size_t)got))
        return -1;
    return answer->nlmsg_type == NLMSG_ERROR ? -((struct nlmsgerr *)NLMSG_DATA(answer))->error : 0;
}

/* Wishes for the end of those whose own address it is. */
static size_t find(int fd, int family, int protocol, const void *address, size_t length, struct wish found[AT_ONCE])
{
    struct wish all = {
        .header = {.nlmsg_len = sizeof all, .nlmsg_type = SOCK_DIAG_BY_FAMILY, .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP},
        .body = {.sdiag_family = (uint8_t)family, .sdiag_protocol = (uint8_t)protocol, .idiag_states = ~0U},
    };
    size_t count = 0;
    if (send(fd, &all, sizeof all, 0) < 0)
        return 0;
    for (;;) {
        ssize_t got = recv(fd, answers, sizeof answers, 0);
        if (got <= 0)
            return count;
        size_t left = (size_t)got;
        for (struct nlmsghdr *h = (void *)answers; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR)
                return count;
            struct inet_diag_msg *seen = NLMSG_DATA(h);
            if (count == AT_ONCE || memcmp(seen->id.idiag_src, address, length) != 0)
                continue;
            found[count] = all;
            found[count].header.nlmsg_type = SOCK_DESTROY;
            found[count].header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
            found[count].body.id = seen->id;
            count++;
        }
    }
}

static void end_all(int fd, int family, int protocol, const void *address, size_t length)
{
    static struct wish found[AT_ONCE];
    for (int look = 0; look < LOOKS; look++) {
        size_t ended = 0, count = find(fd, family, protocol, address, length, found);
        for (size_t i = 0; i < count; i++)
            ended += ask(fd, &found[i].header) == 0;
        if (ended == 0)
            return;
    }
}

/* Of 4 or 16 bytes; a socket of IPv6 may have one of IPv4 (RFC 4291, 2.5.5.2). */
void remains_end_connections(const unsigned char *address, size_t length)
{
    unsigned char mapped[16] = {[10] = 0xff, [11] = 0xff};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    if (fd < 0)
        return;
    if (length == 4)
        memcpy(mapped + 12, address, 4);
    else
        memcpy(mapped, address, sizeof mapped);
    const int protocols[] = {IPPROTO_TCP, IPPROTO_UDP};
    for (size_t i = 0; i < sizeof protocols / sizeof *protocols; i++) {
        if (length == 4)
            end_all(fd, AF_INET, protocols[i], address, length);
        end_all(fd, AF_INET6, protocols[i], mapped, sizeof mapped);
    }
    close(fd);
}

/* What is measured of peers is kept by address, ours and theirs (net/ipv4/tcp_metrics.c). */
void remains_forget_peers(void)
{
    static const char name[] = TCP_METRICS_GENL_NAME;
    struct {
        struct nlmsghdr header;
        struct genlmsghdr command;
        struct rtattr attribute;
        char name[NLMSG_ALIGN(sizeof name)];
    } m = {
        .header = {.nlmsg_type = GENL_ID_CTRL, .nlmsg_flags = NLM_F_REQUEST},
        .command = {.cmd = CTRL_CMD_GETFAMILY, .version = 1},
        .attribute = {.rta_len = RTA_LENGTH(sizeof name), .rta_type = CTRL_ATTR_FAMILY_NAME},
    };
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
    if (fd < 0)
        return;
    memcpy(m.name, name, sizeof name);
    m.header.nlmsg_len = sizeof m;
    if (ask(fd, &m.header) == 0) {
        struct nlmsghdr *answer = (void *)answers;
        size_t left = answer->nlmsg_len - NLMSG_LENGTH(GENL_HDRLEN);
        struct rtattr *a = (void *)((unsigned char *)NLMSG_DATA(answer) + GENL_HDRLEN);
        for (; RTA_OK(a, left); a = RTA_NEXT(a, left)) {
            if (a->rta_type != CTRL_ATTR_FAMILY_ID)
                continue;
            m.header.nlmsg_type = *(uint16_t *)RTA_DATA(a);
            m.header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
            m.header.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN);
            m.command = (struct genlmsghdr){.cmd = TCP_METRICS_CMD_DEL, .version = TCP_METRICS_GENL_VERSION};
            ask(fd, &m.header);
            break;
        }
    }
    close(fd);
}
