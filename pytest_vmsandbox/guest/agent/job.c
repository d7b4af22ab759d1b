/*
 * A job: one command or transfer in a child of ours, or a connection; its streams, and how it ends.
 *
 * To the host a job is over when it has been told of the exit and of the end of each output stream;
 * nothing about that id is said afterwards. A job of a former session stays in the list, mute, until
 * its child is dead.
 */
#include "agent.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { CHUNK = 65536 };

struct job *jobs;

struct job *job_find(uint32_t id)
{
    for (struct job *job = jobs; job; job = job->next)
        if (job->id == id && !job->detached)
            return job;
    return NULL;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void drop_input(struct job *job)
{
    close_fd(&job->input_fd);
    free(job->input);
    job->input = NULL;
    job->input_start = job->input_end = 0;
}

static void end_output(struct job *job, int index)
{
    if (job->output[index].fd < 0)
        return;
    close_fd(&job->output[index].fd);
    if (job->is_pty)
        drop_input(job); /* the same terminal: it hangs up only when nobody holds it */
    if (!job->detached && !job->failed)
        line_send(FRAME_EOF, (uint8_t)(index + 1), job->id, NULL, 0);
}

/* All its streams end. */
void job_hang_up(struct job *job)
{
    drop_input(job);
    end_output(job, 0);
    end_output(job, 1);
}

struct job *job_new(uint32_t id)
{
    int count = 0;
    for (struct job *job = jobs; job; job = job->next)
        count++;
    struct job *job = count < JOBS_MAX && !job_find(id) ? calloc(1, sizeof *job) : NULL;
    if (!job) {
        line_failed(id, EAGAIN, "too many jobs at once");
        return NULL;
    }
    job->id = id;
    job->status_fd = job->input_fd = job->output[0].fd = job->output[1].fd = -1;
    return job;
}

void job_discard(struct job *job)
{
    drop_input(job);
    close_fd(&job->status_fd);
    close_fd(&job->output[0].fd);
    close_fd(&job->output[1].fd);
    launch_free(job->launch);
    free(job);
}

/* A pipe whose `ours` end never blocks the loop, and whose other end is an ordinary one. */
static bool open_pipe(int *ours, int *theirs, bool we_write)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return false;
    *ours = ends[we_write];
    *theirs = ends[!we_write];
    return fcntl(*ours, F_SETFL, O_NONBLOCK) == 0;
}

static bool open_terminal(struct job *job, int fds[3], struct winsize *size)
{
    int zero = 0;
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (master < 0)
        return false;
    job->output[0].fd = master;
    job->input_fd = fcntl(master, F_DUPFD_CLOEXEC, 0);
    fds[0] = ioctl(master, TIOCSPTLCK, &zero) < 0 ? -1 : ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    fds[1] = fds[2] = fds[0];
    return job->input_fd >= 0 && fds[0] >= 0 && ioctl(master, TIOCSWINSZ, size) == 0;
}

static bool open_streams(struct job *job, int fds[3], uint8_t flags, struct winsize *size)
{
    if (flags & EXEC_PTY) {
        job->is_pty = true;
        return open_terminal(job, fds, size);
    }
    if (flags & EXEC_STDIN ? !open_pipe(&job->input_fd, &fds[0], true)
                           : (fds[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    if (!open_pipe(&job->output[0].fd, &fds[1], false))
        return false;
    if (flags & EXEC_MERGE)
        fds[2] = fds[1];
    else if (!open_pipe(&job->output[1].fd, &fds[2], false))
        return false;
    return true;
}

static void close_theirs(int fds[3])
{
    for (int i = 0; i < 3; i++) {
        bool closed = (i > 0 && fds[i] == fds[0]) || (i > 1 && fds[i] == fds[1]);
        if (fds[i] >= 0 && !closed)
            close(fds[i]);
    }
}

void job_add(struct job *job)
{
    job->next = jobs;
    jobs = job;
}

void job_started(struct job *job)
{
    unsigned char payload[4];
    put_u32(payload, (uint32_t)job->pid);
    job->started = true;
    line_send(FRAME_STARTED, 0, job->id, payload, sizeof payload);
}

static void job_exited(struct job *job, int status)
{
    unsigned char payload[4];
    job->exited = true;
    put_u32(payload, (uint32_t)status);
    if (!job->detached && !job->failed)
        line_send(FRAME_EXITED, 0, job->id, payload, sizeof payload);
}

/* True if the job runs (or is about to tell that it can't). Owns `request` from now on. */
bool job_start_exec(uint32_t id, unsigned char *request, size_t length)
{
    struct reader r = reader_of(request, length);
    uint8_t flags = read_u8(&r);
    struct winsize size = {.ws_row = read_u16(&r), .ws_col = read_u16(&r)};
    uint32_t window = read_u32(&r);
    struct job *job = job_new(id);
    if (!job) {
        free(request);
        return false;
    }
    int fds[3] = {-1, -1, -1}, status = -1;
    job->launch = launch_parse(id, request, &r, flags & EXEC_INHERIT_ENV);
    if (!job->launch) {
        job_discard(job);
        return false;
    }
    job->output[0].credit = job->output[1].credit = window;
    if (open_streams(job, fds, flags, &size) && open_pipe(&job->status_fd, &status, false)) {
        memcpy(job->launch->fds, fds, sizeof fds);
        job->launch->status_fd = status;
        job->launch->pty = job->is_pty;
        job->pid = launch_start(job->launch);
    } else {
        job->pid = -errno;
    }
    close_theirs(fds);
    close_fd(&status);
    if (job->pid > 0) {
        job_add(job);
        return true;
    }
    line_failed(id, -job->pid, "start");
    job_discard(job);
    return false;
}

/* Files and trees: a fork of ourselves whose stdin and stdout are streams like any command's. */
void job_start_transfer(uint32_t id, unsigned char *request, size_t length)
{
    struct reader r = reader_of(request, length);
    uint32_t window = read_u32(&r);
    struct job *job = job_new(id);
    if (!job)
        return;
    int fds[3] = {-1, -1, -1};
    job->kind = JOB_TRANSFER;
    job->output[0].credit = job->output[1].credit = window;
    job->pid = open_streams(job, fds, EXEC_STDIN, NULL) ? fork() : -1;
    if (job->pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        for (int fd = 0; fd < 3; fd++)
            dup2(fds[fd], fd);
        close_from(3);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGPIPE, SIG_IGN); /* so that a put that is given up still removes its half */
        transfer_run(r.at, (size_t)(r.end - r.at));
    }
    int error = errno;
    close_theirs(fds);
    if (job->pid > 0) {
        job_add(job);
        job_started(job);
        return;
    }
    line_failed(id, error, "start");
    job_discard(job);
}

void job_read_status(struct job *job)
{
    struct launch_error error;
    ssize_t count = read(job->status_fd, &error, sizeof error);
    if (count < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    close_fd(&job->status_fd);
    if (count != sizeof error) {
        if (!job->detached)
            job_started(job);
    } else {
        const struct launch *launch = job->launch;
        const char *where[] = {launch->argv[0], launch->cwd, launch->user};
        if (!job->detached)
            line_failed(job->id, error.error, where[error.stage]);
        job->failed = true;
        job_hang_up(job);
    }
    launch_free(job->launch);
    job->launch = NULL;
}

/* The host has been told of its end and of its outputs', and knows nothing of it any more. */
static bool is_over(const struct job *job)
{
    return job->exited && job->output[0].fd < 0 && job->output[1].fd < 0;
}

static void give_credit(struct job *job)
{
    unsigned char payload[4];
    if (job->detached || job->input_owed == 0 || is_over(job))
        return;
    put_u32(payload, job->input_owed);
    job->input_owed = 0;
    line_send(FRAME_CREDIT, 0, job->id, payload, sizeof payload);
}

static void input_refused(struct job *job)
{
    drop_input(job);
    if (!job->detached && !is_over(job))
        line_send(FRAME_EOF, 0, job->id, NULL, 0);
}

/* Writes what there is to write; false when the process takes no more for now, or never again. */
static size_t write_some(struct job *job, const unsigned char *data, size_t length)
{
    size_t done = 0;
    while (done < length) {
        ssize_t count = write(job->input_fd, data + done, length - done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0 && errno == EAGAIN)
            break;
        if (count < 0) {
            if (job->kind == JOB_CONNECTION && !job->exited)
                job_exited(job, errno);
            input_refused(job);
            break;
        }
        done += (size_t)count;
    }
    job->input_owed += (uint32_t)done;
    return done;
}

static void end_input_if_due(struct job *job)
{
    if (!job->input_ending || job->input_fd < 0 || job->input)
        return;
    if (job->kind == JOB_CONNECTION)
        shutdown(job->input_fd, SHUT_WR); /* the same socket brings what comes from there */
    if (job->is_pty) { /* a terminal has no end, it has an end-of-file character */
        ssize_t ignored = write(job->input_fd, "\004", 1);
        (void)ignored;
        job->input_ending = false;
        return;
    }
    drop_input(job);
}

void job_write_input(struct job *job)
{
    size_t length = job->input_end - job->input_start;
    size_t done = write_some(job, job->input + job->input_start, length);
    if (job->input_fd >= 0) {
        job->input_start += done;
        if (job->input_start == job->input_end) {
            free(job->input);
            job->input = NULL;
            job->input_start = job->input_end = 0;
        }
    }
    if (!job->input || job->input_owed >= STDIN_WINDOW / 4)
        give_credit(job);
    end_input_if_due(job);
}

void job_data(uint32_t id, unsigned char *data, size_t length)
{
    struct job *job = job_find(id);
    if (!job || job->input_fd < 0 || job->input_ending)
        return; /* it closed its stdin before this arrived, and has said so */
    size_t done = job->input ? 0 : write_some(job, data, length);
    if (job->input_fd < 0)
        return;
    data += done;
    length -= done;
    if (length) {
        if (!job->input)
            job->input = malloc(STDIN_WINDOW);
        if (job->input && job->input_end + length > STDIN_WINDOW) {
            memmove(job->input, job->input + job->input_start, job->input_end - job->input_start);
            job->input_end -= job->input_start;
            job->input_start = 0;
        }
        if (!job->input || job->input_end + length > STDIN_WINDOW) {
            input_refused(job); /* no memory, or a host that sends more than it was given credit for */
            return;
        }
        memcpy(job->input + job->input_end, data, length);
        job->input_end += length;
    }
    if (job->input_owed >= STDIN_WINDOW / 4)
        give_credit(job);
}

void job_input_end(uint32_t id)
{
    struct job *job = job_find(id);
    if (!job || job->input_fd < 0)
        return;
    job->input_ending = true;
    end_input_if_due(job);
}

void job_credit(uint32_t id, int stream, uint32_t bytes)
{
    struct job *job = job_find(id);
    if (!job || stream < 1 || stream > 2)
        return;
    struct output *output = &job->output[stream - 1];
    output->credit = bytes > UINT32_MAX - output->credit ? UINT32_MAX : output->credit + bytes;
}

void job_close_output(uint32_t id, int stream)
{
    struct job *job = job_find(id);
    if (job && (stream == 1 || stream == 2))
        end_output(job, stream - 1);
}

bool job_wants_output(const struct job *job, int index)
{
    const struct output *output = &job->output[index];
    return output->fd >= 0 && (job->started || job->detached) &&
           (job->detached || (output->credit > 0 && line_has_room(CHUNK)));
}

static void throw_away(struct job *job, int index)
{
    static unsigned char nowhere[CHUNK];
    ssize_t count = read(job->output[index].fd, nowhere, sizeof nowhere);
    if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR))
        end_output(job, index);
}

void job_read_output(struct job *job, int index)
{
    struct output *output = &job->output[index];
    if (job->detached) {
        throw_away(job, index);
        return;
    }
    unsigned char *place = line_reserve(CHUNK);
    if (!place)
        return;
    size_t wanted = output->credit < CHUNK ? output->credit : CHUNK;
    ssize_t count = read(output->fd, place, wanted);
    if (count > 0) {
        output->credit -= (uint32_t)count;
        line_commit(FRAME_DATA, (uint8_t)(index + 1), job->id, (size_t)count);
    } else if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
        if (count < 0 && job->kind == JOB_CONNECTION && !job->exited)
            job_exited(job, errno); /* first, so that the end of the stream is known for no orderly one */
        end_output(job, index);     /* a terminal that nobody holds any more says EIO */
    }
}

/* The group of a dead leader may be signalled as long as no new process has taken its number. */
static int signal_group(const struct job *job, int number)
{
    if (job->exited && kill(job->pid, 0) == 0)
        return ESRCH;
    if (kill(-job->pid, number) == 0)
        return 0;
    /* between clone and setsid there is no such group yet */
    return errno == ESRCH && !job->exited && kill(job->pid, number) == 0 ? 0 : errno;
}

void job_signal(uint32_t request_id, uint32_t job_id, int number, bool kill_streams)
{
    struct job *job = job_find(job_id);
    if (number < 0 || number > 64) {
        line_failed(request_id, EINVAL, "signal");
        return;
    }
    int error = ESRCH;
    if (job && job->kind == JOB_CONNECTION) {
        if (!connection_is_ending(job))
            connection_reset(job);
        error = 0;
    } else if (job && job->kind == JOB_TRANSFER) {
        drop_input(job); /* it notices, removes what is half-made, and ends */
        end_output(job, 0);
        error = 0;
    } else if (job) {
        error = signal_group(job, number);
        job->killed |= kill_streams;
    }
    if (error && error != ESRCH)
        line_failed(request_id, error, "signal");
    else
        line_done(request_id); /* gone already: like subprocess, that is no error */
}

void job_resize(uint32_t request_id, uint32_t job_id, uint16_t rows, uint16_t columns)
{
    struct job *job = job_find(job_id);
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (!job || !job->is_pty || job->output[0].fd < 0)
        line_failed(request_id, ENOTTY, "resize");
    else if (ioctl(job->output[0].fd, TIOCSWINSZ, &size) < 0)
        line_failed(request_id, errno, "resize");
    else
        line_done(request_id);
}

void job_reaped(pid_t pid, int wait_status)
{
    struct job *job = jobs;
    while (job && (job->pid != pid || job->exited))
        job = job->next;
    if (!job)
        return;
    if (job->status_fd >= 0)
        job_read_status(job); /* its exec, or its failure, came before its death */
    job_exited(job, WIFSIGNALED(wait_status) ? -WTERMSIG(wait_status) : WEXITSTATUS(wait_status));
}

/* A new host: what the former one started is killed, or, if asked for, runs on unheard. */
void jobs_end_session(bool keep)
{
    for (struct job *job = jobs; job; job = job->next) {
        if (job->detached)
            continue;
        if (job->kind == JOB_CONNECTION) {
            job->detached = true;
            connection_reset(job);
        } else if (!keep || job->kind == JOB_TRANSFER) {
            job->detached = true;
            job_hang_up(job);
            if (job->kind == JOB_COMMAND)
                signal_group(job, SIGKILL);
        } else {
            job->detached = true; /* its stdin stays open: an end there would end it */
        }
    }
}

static bool has_nothing_left_to_read(int fd)
{
    int waiting = 0;
    return ioctl(fd, FIONREAD, &waiting) < 0 || waiting == 0;
}

/* Ends the streams of the killed, and forgets the jobs that are over. */
void jobs_sweep(void)
{
    for (struct job **link = &jobs; *link;) {
        struct job *job = *link;
        for (int i = 0; i < 2; i++)
            if (job->killed && job->exited && job->output[i].fd >= 0 && has_nothing_left_to_read(job->output[i].fd))
                end_output(job, i);
        if (connection_has_ended(job))
            job_exited(job, 0);
        if (is_over(job)) {
            *link = job->next;
            job_discard(job);
            continue;
        }
        link = &job->next;
    }
}
