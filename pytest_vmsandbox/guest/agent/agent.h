/*
 * The guest's agent: one process, one loop, one line to the host.
 *
 * Read in this order: frame.c (the line), job.c (commands and their streams), launch.c (how a command
 * starts), connection.c (ports), transfer.c (files and trees), machine.c (what pid 1 and a restore
 * need), addresses.c (network cards), settings.c (what else a restored machine is given), main.c (the
 * loop).
 * The protocol is described in docs/protocol.md.
 *
 * Rule of the house: the loop never waits. Whatever can block on a file system runs in a child.
 */
#ifndef AGENT_H
#define AGENT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define AGENT_VERSION "1"
#define PROTOCOL_VERSION 3

enum {
    PAYLOAD_MAX = 65536,
    HEADER_SIZE = 16,
    TRAILER_SIZE = 4,
    FRAME_MAX = HEADER_SIZE + PAYLOAD_MAX + TRAILER_SIZE,
    STDIN_WINDOW = 256 * 1024, /* what the host may send to one stdin before it is given credit */
    REQUEST_MAX = 2 * 1024 * 1024,
    JOBS_MAX = 200,
    TOKEN_SIZE = 16,
};

enum frame_type {
    FRAME_HELLO = 1,
    FRAME_PING = 2,
    FRAME_MORE = 3,
    FRAME_EXEC = 4,
    FRAME_TRANSFER = 5,
    FRAME_DATA = 6,
    FRAME_EOF = 7,
    FRAME_CREDIT = 8,
    FRAME_CLOSE = 9,
    FRAME_SIGNAL = 10,
    FRAME_KILL = 11,
    FRAME_RESIZE = 12,
    FRAME_POWER = 13,
    FRAME_CONNECT = 14,

    FRAME_WELCOME = 64,
    FRAME_DONE = 65,
    FRAME_FAILED = 66,
    FRAME_STARTED = 67,
    FRAME_EXITED = 68,
    FRAME_STRANGER = 69,
};

enum { EXEC_INHERIT_ENV = 1, EXEC_STDIN = 2, EXEC_PTY = 4, EXEC_MERGE = 8 };
enum { HELLO_KEEP = 1 };
enum power { POWER_OFF = 0, POWER_REBOOT = 1 };

enum transfer_kind {
    TRANSFER_GET = 1,
    TRANSFER_PUT = 2,
    TRANSFER_TREE_GET = 3,
    TRANSFER_TREE_PUT = 4,
    TRANSFER_SYNC = 5,
    TRANSFER_ADDRESSES = 6,
};

struct frame {
    uint8_t type;
    uint8_t stream;
    uint32_t id;
    uint32_t length;
    unsigned char *payload;
};

/* A payload being read: `bad` sticks once a field reaches beyond the end. */
struct reader {
    unsigned char *at, *end;
    bool bad;
};

/* frame.c */
uint32_t get_u32(const unsigned char *p);
void put_u32(unsigned char *p, uint32_t value);
uint8_t read_u8(struct reader *r);
uint16_t read_u16(struct reader *r);
uint32_t read_u32(struct reader *r);
uint64_t read_u64(struct reader *r);
char *read_string(struct reader *r);
struct reader reader_of(void *payload, size_t length);

ssize_t line_receive(int fd);
bool line_next(struct frame *frame);
bool line_has_gap(void);
void line_forget_input(void);
void line_forget_output(void);
bool line_has_output(void);
bool line_has_room(size_t payload);
int line_flush(int fd);
void line_send(uint8_t type, uint8_t stream, uint32_t id, const void *payload, size_t length);
unsigned char *line_reserve(size_t payload);
void line_commit(uint8_t type, uint8_t stream, uint32_t id, size_t length);
void line_done(uint32_t id);
void line_failed(uint32_t id, int error, const char *where);

/* job.c */
struct output {
    int fd; /* -1: ended */
    uint32_t credit;
};

enum job_kind { JOB_COMMAND, JOB_TRANSFER, JOB_CONNECTION };

struct job {
    struct job *next;
    enum job_kind kind;
    uint32_t id;
    pid_t pid;
    bool is_pty;
    bool started; /* the host has been told that it runs (or that it never will) */
    bool failed;  /* it never ran */
    bool exited;
    bool killed;   /* once it is dead, its streams end even if somebody else holds them */
    bool detached; /* of a former session: what it says is read and thrown away */
    int status_fd; /* says EOF when exec has succeeded, an error if not; -1 after that */
    int input_fd;
    bool input_ending;
    unsigned char *input; /* what the process has not read yet: STDIN_WINDOW bytes, or NULL */
    size_t input_start, input_end;
    uint32_t input_owed; /* credit not yet given back to the host */
    struct output output[2];
    struct launch *launch;
};

extern struct job *jobs;
struct job *job_find(uint32_t id);
struct job *job_new(uint32_t id);
void job_add(struct job *job);
void job_discard(struct job *job);
void job_started(struct job *job);
void job_hang_up(struct job *job);
bool job_start_exec(uint32_t id, unsigned char *request, size_t length);
void job_start_transfer(uint32_t id, unsigned char *request, size_t length);
void job_data(uint32_t id, unsigned char *data, size_t length);
void job_input_end(uint32_t id);
void job_credit(uint32_t id, int stream, uint32_t bytes);
void job_close_output(uint32_t id, int stream);
void job_signal(uint32_t request_id, uint32_t job_id, int signal_number, bool kill_streams);
void job_resize(uint32_t request_id, uint32_t job_id, uint16_t rows, uint16_t columns);
void job_reaped(pid_t pid, int wait_status);
void jobs_end_session(bool keep);
void job_write_input(struct job *job);
void job_read_output(struct job *job, int index);
void job_read_status(struct job *job);
void jobs_sweep(void);
bool job_wants_output(const struct job *job, int index);

/* launch.c: what a child that becomes a command needs, in one block of memory */
struct launch {
    unsigned char *request;
    char **argv, **envp;
    char *cwd, *user;
    int fds[3];
    int status_fd;
    bool pty;
    int home_slot, spare_slot; /* in envp; -1 where the request names its own HOME */
    unsigned char *stack;
};
enum launch_stage { STAGE_EXEC = 0, STAGE_CWD = 1, STAGE_USER = 2 };
struct launch_error {
    int32_t error;
    int32_t stage;
};
struct launch *launch_parse(uint32_t id, unsigned char *request, struct reader *r, bool inherit_env);
pid_t launch_start(struct launch *launch);
void launch_free(struct launch *launch);
void close_from(unsigned int first);
int find_group(const char *group, gid_t *gid);
int find_user(const char *user, uid_t *uid, gid_t *gid, char *home, size_t home_size, char *name, size_t name_size);

/* connection.c */
void connection_start(uint32_t id, struct reader *r);
bool connection_is_pending(const struct job *job);
void connection_settle(struct job *job);
void connection_reset(struct job *job);
bool connection_is_ending(const struct job *job);
bool connection_has_ended(const struct job *job);

/* transfer.c: runs in a child of its own; stdin and stdout are streams, stderr takes the report */
_Noreturn void transfer_run(unsigned char *request, size_t length);
_Noreturn void transfer_fail(int error, const char *path);
void write_all(int fd, const void *data, size_t length, const char *path);

/* machine.c */
struct facts {
    char nonce[65];
    char boot_id[40];
    char restore_id[65];
    bool is_init;
    bool owns_machine; /* whether clock, names, addresses and power are ours to change */
};
extern struct facts facts;

/* What a host wants the machine to be before it is answered; what is empty stays as it is. */
struct identity {
    const char *hostname, *machine_id;
    uint64_t unix_ns;
    const unsigned char *entropy;
    size_t entropy_length;
};

struct refusal {
    int error; /* 0: none */
    const char *what;
};
void machine_start(void);
int machine_find_port(void);
void machine_find_disks(void);
void machine_facts(const char *nonce);
struct refusal machine_individualize(const struct identity *identity);
void machine_power(enum power how);
int machine_power_step(void);

/* addresses.c */
struct refusal machine_set_addresses(const char *interface, struct reader *r, bool patiently);

/* settings.c */
bool machine_furnish(struct reader *r);

/* remains.c */
void remains_end_connections(const unsigned char *address, size_t length);
void remains_forget_peers(void);

void console_note(const char *what, const char *detail, int error);

#endif
