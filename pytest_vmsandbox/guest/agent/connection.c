/*
 * A connection to a TCP port as this machine reaches it: a job without a child, whose stdin and stdout
 * are the two directions of one socket.
 */
#include "agent.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* Its size; 0 if the request names none. */
static socklen_t read_address(struct reader *r, union address *to)
{
    uint8_t length = read_u8(r);
    unsigned char *bytes = r->at;
    if (r->bad || (length != 4 && length != 16) || r->end - r->at != length + 2)
        return 0;
    r->at += length;
    memset(to, 0, sizeof *to);
    if (length == 4) {
        to->v4.sin_family = AF_INET;
        to->v4.sin_port = htons(read_u16(r));
        memcpy(&to->v4.sin_addr, bytes, length);
        return sizeof to->v4;
    }
    to->v6.sin6_family = AF_INET6;
    to->v6.sin6_port = htons(read_u16(r));
    memcpy(&to->v6.sin6_addr, bytes, length);
    return sizeof to->v6;
}

/* A socket that connects, or has; -1 and errno. What is written in pieces goes on in pieces. */
static int connecting(const union address *to, socklen_t size)
{
    int one = 1;
    int fd = socket(to->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, &to->any, size) == 0 || errno == EINPROGRESS)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

void connection_start(uint32_t id, struct reader *r)
{
    union address to;
    uint32_t window = read_u32(r);
    socklen_t size = read_address(r, &to);
    if (!size) {
        line_failed(id, EINVAL, "connect");
        return;
    }
    struct job *job = job_new(id);
    if (!job)
        return;
    job->kind = JOB_CONNECTION;
    job->pid = getpid(); /* who holds it */
    job->output[0].credit = window;
    job->output[0].fd = connecting(&to, size);
    if (job->output[0].fd < 0 || (job->input_fd = fcntl(job->output[0].fd, F_DUPFD_CLOEXEC, 0)) < 0) {
        line_failed(id, errno, "connect");
        job_discard(job);
        return;
    }
    job_add(job); /* that it has connected, or can't, shows as writable */
}

bool connection_is_pending(const struct job *job)
{
    return job->kind == JOB_CONNECTION && !job->started && job->output[0].fd >= 0;
}

static void fail(struct job *job, int error)
{
    job->failed = true;
    if (!job->detached)
        line_failed(job->id, error, "connect");
}

void connection_settle(struct job *job)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(job->output[0].fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0)
        error = errno;
    if (!error) {
        job_started(job);
        return;
    }
    fail(job, error);
    job_hang_up(job);
}

/* So that the other side sees an error, not an end (socket(7), SO_LINGER). */
void connection_reset(struct job *job)
{
    struct linger at_once = {.l_onoff = 1, .l_linger = 0};
    int fd = job->output[0].fd >= 0 ? job->output[0].fd : job->input_fd;
    if (connection_is_pending(job))
        fail(job, ECANCELED);
    if (fd >= 0)
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    job_hang_up(job);
}

/* Whether both sides have said that no more will come; the last of what is ours may still be on its way. */
bool connection_is_ending(const struct job *job) { return job->input_ending && job->output[0].fd < 0; }

/* Whether it is over without having been told so: both directions have ended. */
bool connection_has_ended(const struct job *job)
{
    return job->kind == JOB_CONNECTION && !job->exited && job->input_fd < 0 && job->output[0].fd < 0;
}
