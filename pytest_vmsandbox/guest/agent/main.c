/*
 * The loop, and what each frame of the host asks for.
 *
 *   agent                as pid 1 of a machine: sets it up, finds the port by name
 *   agent --port PATH    an ordinary daemon on that port
 *   agent --fd N         over an inherited socket; ends with it; changes nothing of the machine
 *                        unless --own-machine is given as well
 */
#include "agent.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PORT_PAGE = 4096, AWAY_MS = 50, POLLS_MAX = 2 + 4 * JOBS_MAX };

static int line_fd = -1, signal_fd = -1;
static bool line_is_socket;
static bool host_away; /* virtio-serial: nobody has the other end open */
static bool line_watched;
static bool in_session;
static bool stranger_told;
static unsigned char session_token[TOKEN_SIZE];
static uint32_t sessions;
static struct refusal refused; /* what the host of this session can't have */
static bool furnished;         /* whether the machine has all that came with the identity */

/* A request in several frames: MORE, MORE, ..., then the frame that says what it is. */
static struct {
    uint32_t id;
    unsigned char *bytes;
    size_t length;
} gathered;

/* While the host is away the kernel is to say by SIGIO when it comes back. Not always: then each
 * byte that comes would bring a signal as well. */
static void set_host_away(bool away)
{
    if (away == host_away)
        return;
    host_away = away;
    fcntl(line_fd, F_SETFL, O_NONBLOCK | (away && !line_is_socket ? O_ASYNC : 0));
}

static void forget_gathered(void)
{
    free(gathered.bytes);
    memset(&gathered, 0, sizeof gathered);
}

static void gather(const struct frame *frame)
{
    if (gathered.id != frame->id)
        forget_gathered();
    unsigned char *grown = NULL;
    if (gathered.length + frame->length <= REQUEST_MAX)
        grown = realloc(gathered.bytes, gathered.length + frame->length + 1);
    if (!grown) {
        forget_gathered();
        return; /* the request that follows is malformed without its beginning, and is told so */
    }
    memcpy(grown + gathered.length, frame->payload, frame->length);
    gathered.id = frame->id;
    gathered.bytes = grown;
    gathered.length += frame->length;
}

static void start_exec(struct frame *frame)
{
    gather(frame);
    unsigned char *request = gathered.bytes;
    size_t length = gathered.length;
    gathered.bytes = NULL;
    forget_gathered();
    if (request)
        job_start_exec(frame->id, request, length);
    else
        line_failed(frame->id, ENOMEM, "exec");
}

static unsigned char *put_text(unsigned char *at, const char *text)
{
    size_t length = strlen(text);
    put_u32(at, (uint32_t)length);
    memcpy(at + 4, text, length + 1);
    return at + 4 + length + 1;
}

static void welcome(uint32_t id)
{
    unsigned char payload[2048], *at = payload;
    struct utsname name;
    uname(&name);
    memcpy(at, session_token, TOKEN_SIZE);
    at += TOKEN_SIZE;
    put_u32(at, PROTOCOL_VERSION);
    put_u32(at + 4, facts.is_init);
    put_u32(at + 8, sessions);
    at = put_text(at + 12, AGENT_VERSION);
    at = put_text(at, facts.nonce);
    at = put_text(at, facts.boot_id);
    at = put_text(at, name.release);
    at = put_text(at, name.machine);
    at = put_text(at, name.nodename);
    at = put_text(at, facts.restore_id);
    put_u32(at, (uint32_t)refused.error);
    at = put_text(at + 4, refused.what);
    put_u32(at, furnished);
    at += 4;
    line_send(FRAME_WELCOME, 0, id, payload, (size_t)(at - payload));
}

/* A host asks again until it is answered, so the same token twice is one session. */
static void hello(struct frame *frame)
{
    struct reader r = reader_of(frame->payload, frame->length);
    if (frame->length < TOKEN_SIZE)
        return;
    unsigned char *token = r.at;
    r.at += TOKEN_SIZE;
    uint32_t flags = read_u32(&r);
    char *restore_id = read_string(&r);
    struct identity identity;
    identity.hostname = read_string(&r);
    identity.machine_id = read_string(&r);
    identity.unix_ns = read_u64(&r);
    identity.entropy_length = read_u32(&r);
    if (r.bad || identity.entropy_length > (size_t)(r.end - r.at))
        return;
    identity.entropy = r.at;
    r.at += identity.entropy_length;
    if (!in_session || memcmp(session_token, token, TOKEN_SIZE) != 0) {
        jobs_end_session(flags & HELLO_KEEP);
        line_forget_output();
        forget_gathered();
        memcpy(session_token, token, TOKEN_SIZE);
        sessions++;
        in_session = true;
        if (*restore_id)
            snprintf(facts.restore_id, sizeof facts.restore_id, "%s", restore_id);
        refused = machine_individualize(&identity);
        furnished = !refused.error && r.at < r.end && facts.owns_machine && machine_furnish(&r);
    }
    welcome(frame->id);
}

static void change_power(struct frame *frame, struct reader *r)
{
    uint32_t id = frame->id;
    if (!facts.owns_machine) {
        line_failed(id, EPERM, "this agent does not own its machine");
        return;
    }
    line_done(id);
    machine_power(read_u8(r) == POWER_REBOOT ? POWER_REBOOT : POWER_OFF);
}

static void start_transfer(struct frame *frame)
{
    /* kind is the byte after the window; what changes the machine needs leave for it */
    bool changes = frame->length > 4 && frame->payload[4] >= TRANSFER_ADDRESSES;
    if (changes && !facts.owns_machine)
        line_failed(frame->id, EPERM, "this agent does not own its machine");
    else
        job_start_transfer(frame->id, frame->payload, frame->length);
}

static void about_job(struct frame *frame, struct reader *r)
{
    uint32_t job = read_u32(r);
    uint32_t number = frame->type == FRAME_SIGNAL ? read_u32(r) : SIGKILL;
    if (frame->type == FRAME_RESIZE) {
        uint16_t rows = read_u16(r), columns = read_u16(r);
        job_resize(frame->id, job, rows, columns);
    } else {
        job_signal(frame->id, job, (int)number, frame->type == FRAME_KILL);
    }
}

static void obey(struct frame *frame)
{
    struct reader r = reader_of(frame->payload, frame->length);
    switch (frame->type) {
    case FRAME_PING:
        line_done(frame->id);
        break;
    case FRAME_MORE:
        gather(frame);
        break;
    case FRAME_EXEC:
        start_exec(frame);
        break;
    case FRAME_TRANSFER:
        start_transfer(frame);
        break;
    case FRAME_CONNECT:
        connection_start(frame->id, &r);
        break;
    case FRAME_DATA:
        job_data(frame->id, frame->payload, frame->length);
        break;
    case FRAME_EOF:
        job_input_end(frame->id);
        break;
    case FRAME_CREDIT:
        job_credit(frame->id, frame->stream, read_u32(&r));
        break;
    case FRAME_CLOSE:
        job_close_output(frame->id, frame->stream);
        break;
    case FRAME_SIGNAL:
    case FRAME_KILL:
    case FRAME_RESIZE:
        about_job(frame, &r);
        break;
    case FRAME_POWER:
        change_power(frame, &r);
        break;
    default:
        line_failed(frame->id, ENOSYS, "unknown request");
    }
}

static void handle(struct frame *frame)
{
    if (frame->type == FRAME_HELLO && machine_power_step() >= 0)
        return; /* going down: it is for the next boot's agent to answer */
    if (frame->type == FRAME_HELLO)
        hello(frame);
    else if (in_session)
        obey(frame);
    else if (!stranger_told) {
        /* We have just started, or the host has: it must introduce itself before we obey. */
        stranger_told = true;
        line_send(FRAME_STRANGER, 0, 0, NULL, 0);
    }
}

static void handle_frames(void)
{
    struct frame frame;
    while (line_has_room(0) && line_next(&frame))
        handle(&frame);
}

static void receive(void)
{
    ssize_t count;
    stranger_told = false;
    do /* a virtio port gives a page at a time: take what is there before asking poll(2) again */
        count = line_receive(line_fd);
    while (count >= PORT_PAGE && line_has_gap());
    if (count > 0)
        return;
    if (count < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (line_is_socket) {
        jobs_end_session(false);
        exit(0);
    }
    set_host_away(true); /* 0 from a virtio port: the host has closed its end, and may come back */
    line_forget_input();
}

static void stop(enum power how)
{
    if (facts.is_init) {
        machine_power(how);
        return;
    }
    jobs_end_session(false);
    exit(0);
}

static void reap(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        job_reaped(pid, status);
}

static void take_signals(void)
{
    struct signalfd_siginfo seen;
    bool child = false;
    while (read(signal_fd, &seen, sizeof seen) == sizeof seen) {
        if (seen.ssi_signo == SIGCHLD)
            child = true;
        else if (seen.ssi_signo == SIGTERM || seen.ssi_signo == SIGINT) /* busybox reboot, ctrl-alt-del */
            stop(POWER_REBOOT);
        else if (seen.ssi_signo == SIGUSR1 || seen.ssi_signo == SIGUSR2) /* busybox halt, poweroff */
            stop(POWER_OFF);
    }
    if (child)
        reap();
}

/* SIGPIPE is blocked rather than ignored, since what is ignored would be inherited through exec. */
static void open_signals(void)
{
    sigset_t ours;
    sigemptyset(&ours);
    const int numbers[] = {SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGIO, SIGPIPE, SIGHUP};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaddset(&ours, numbers[i]);
    /* Whoever started us may ignore some (nohup does): commands shall not inherit that. */
    for (int number = 1; number < 32; number++)
        signal(number, SIG_DFL);
    sigprocmask(SIG_BLOCK, &ours, NULL);
    sigdelset(&ours, SIGPIPE);
    signal_fd = signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
}

struct watch {
    struct job *job;
    enum { WATCH_STATUS, WATCH_CONNECTING, WATCH_INPUT, WATCH_OUTPUT } what;
    int index;
};

static struct pollfd polls[POLLS_MAX];
static struct watch watches[POLLS_MAX];
static nfds_t polled;

static void watch(int fd, short events, struct watch what)
{
    if (fd < 0 || polled == POLLS_MAX)
        return;
    watches[polled] = what;
    polls[polled++] = (struct pollfd){.fd = fd, .events = events};
}

static void watch_jobs(void)
{
    for (struct job *job = jobs; job; job = job->next) {
        watch(job->status_fd, POLLIN, (struct watch){.job = job, .what = WATCH_STATUS});
        if (connection_is_pending(job))
            watch(job->output[0].fd, POLLOUT, (struct watch){.job = job, .what = WATCH_CONNECTING});
        if (job->input)
            watch(job->input_fd, POLLOUT, (struct watch){.job = job, .what = WATCH_INPUT});
        for (int i = 0; i < 2; i++)
            if (job_wants_output(job, i))
                watch(job->output[i].fd, POLLIN, (struct watch){.job = job, .what = WATCH_OUTPUT, .index = i});
    }
}

static void watch_all(void)
{
    polled = 0;
    watch(signal_fd, POLLIN, (struct watch){0});
    short events = (short)((line_has_room(0) ? POLLIN : 0) | (line_has_output() ? POLLOUT : 0));
    line_watched = !host_away;
    if (line_watched)
        watch(line_fd, events, (struct watch){0});
    watch_jobs();
}

static void serve(const struct watch *watch, int fd)
{
    struct job *job = watch->job;
    if (watch->what == WATCH_STATUS && job->status_fd == fd)
        job_read_status(job);
    else if (watch->what == WATCH_CONNECTING && connection_is_pending(job))
        connection_settle(job);
    else if (watch->what == WATCH_INPUT && job->input_fd == fd && job->input)
        job_write_input(job);
    else if (watch->what == WATCH_OUTPUT && job->output[watch->index].fd == fd && job_wants_output(job, watch->index))
        job_read_output(job, watch->index);
}

/* While the host is away poll(2) would report POLLHUP without end: look again from time to time, and
 * at once when the kernel sends SIGIO, as virtio_console does when the host opens or closes its end. */
static void look_for_host(void)
{
    struct pollfd line = {.fd = line_fd, .events = POLLIN};
    set_host_away(poll(&line, 1, 0) > 0 && (line.revents & POLLHUP));
}

static void flush(void)
{
    if (host_away || line_flush(line_fd) >= 0)
        return;
    if (line_is_socket) {
        jobs_end_session(false);
        exit(0);
    }
    line_forget_output();
}

static void loop(void)
{
    static unsigned int turn;
    for (;;) {
        watch_all();
        int wait_ms = machine_power_step();
        if (host_away && (wait_ms < 0 || wait_ms > AWAY_MS))
            wait_ms = AWAY_MS;
        if (poll(polls, polled, wait_ms) < 0 && errno != EINTR)
            continue;
        if (host_away)
            look_for_host();
        nfds_t first = line_watched ? 2 : 1;
        if (line_watched && polls[1].revents & POLLHUP && !line_is_socket) {
            set_host_away(true);
            line_forget_input();
        } else if (line_watched && polls[1].revents & (POLLIN | POLLHUP | POLLERR)) {
            receive();
        }
        turn++; /* begin with another stream each time, so that none starves */
        nfds_t count = polled - first;
        for (nfds_t i = 0; i < count; i++) {
            nfds_t at = first + (i + turn) % count;
            if (polls[at].revents)
                serve(&watches[at], polls[at].fd);
        }
        handle_frames();
        if (polls[0].revents)
            take_signals(); /* after the streams: what a process said comes before its end */
        jobs_sweep();
        flush();
    }
}

static void hold_standard_fds(void)
{
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd < 3)
        fd = dup(fd);
    if (fd >= 3)
        close(fd);
}

static void usage(void)
{
    dprintf(2, "usage: agent [--port PATH | --fd N [--own-machine]] [--nonce HEX]\n");
    exit(2);
}

int main(int argc, char **argv)
{
    const char *nonce = NULL;
    facts.is_init = getpid() == 1;
    facts.owns_machine = true;
    hold_standard_fds();
    umask(022);
    (void)!chdir("/");
    for (int i = 1; i < argc && !(facts.is_init && line_fd < 0 && argv[i][0] != '-'); i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--fd") == 0) {
            line_fd = atoi(value);
            line_is_socket = true;
            facts.owns_machine = false;
        } else if (strcmp(argv[i], "--port") == 0) {
            line_fd = open(value, O_RDWR | O_CLOEXEC | O_NOCTTY);
        } else if (strcmp(argv[i], "--nonce") == 0) {
            nonce = value;
        } else if (strcmp(argv[i], "--own-machine") == 0) {
            facts.owns_machine = true;
            continue;
        } else if (!facts.is_init) {
            usage();
        }
        i++;
    }
    open_signals();
    if (facts.is_init && !line_is_socket)
        machine_start();
    machine_facts(nonce);
    if (line_fd < 0)
        line_fd = machine_find_port();
    if (fcntl(line_fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(line_fd, F_SETOWN, getpid()) < 0 ||
        fcntl(line_fd, F_SETFL, O_NONBLOCK) < 0) {
        console_note("line", "", errno);
        return 1;
    }
    loop();
}
