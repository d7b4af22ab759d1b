/*
 * How a command starts: as few guest instructions as can be, and never waiting for it.
 *
 * The child shares our memory until it execs (CLONE_VM), which saves copying page tables; unlike
 * vfork(2) we go on meanwhile, because chdir and exec may hang on a sick file system. So the child has
 * a stack of its own, touches only its `struct launch`, and makes system calls without errno. That exec
 * has happened is told by the end of file on a close-on-exec pipe. Only when another user is asked for,
 * whose groups must be read from files, is it a plain fork.
 */
#include "agent.h"
#include "raw.h"

#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

extern char **environ;

enum { STACK_SIZE = 16 * 1024 };

static bool names_variable(char *const *env, size_t count, const char *entry)
{
    size_t name = strcspn(entry, "=") + 1;
    for (size_t i = 0; i < count; i++)
        if (strncmp(env[i], entry, name) == 0)
            return true;
    return false;
}

static char **read_strings(struct reader *r, size_t room_for_more, size_t *count)
{
    *count = read_u16(r);
    char **list = calloc(*count + room_for_more + 1, sizeof *list);
    for (size_t i = 0; list && i < *count; i++)
        list[i] = read_string(r);
    return list;
}

/* Takes over `request`, whose strings it points into; NULL (and a FAILED sent) if it is malformed. */
struct launch *launch_parse(uint32_t id, unsigned char *request, struct reader *r, bool inherit_env)
{
    struct launch *launch = calloc(1, sizeof *launch);
    size_t argc = 0, envc = 0, inherited = 0;
    while (inherit_env && environ[inherited])
        inherited++;
    if (!launch) {
        free(request);
        line_failed(id, ENOMEM, "exec");
        return NULL;
    }
    launch->request = request;
    launch->home_slot = launch->spare_slot = -1;
    launch->user = read_string(r);
    launch->cwd = read_string(r);
    launch->argv = read_strings(r, 0, &argc);
    launch->envp = read_strings(r, inherited + 2, &envc);
    launch->stack = malloc(STACK_SIZE);
    if (r->bad || argc == 0 || !launch->argv || !launch->envp || !launch->stack) {
        line_failed(id, r->bad || argc == 0 ? EINVAL : ENOMEM, "exec");
        launch_free(launch);
        return NULL;
    }
    size_t asked = envc;
    for (size_t i = 0; i < inherited; i++) {
        if (names_variable(launch->envp, asked, environ[i]))
            continue;
        if (strncmp(environ[i], "HOME=", 5) == 0)
            launch->home_slot = (int)envc;
        launch->envp[envc++] = environ[i];
    }
    if (inherit_env)
        launch->spare_slot = (int)envc;
    return launch;
}

void launch_free(struct launch *launch)
{
    if (!launch)
        return;
    free(launch->request);
    free(launch->argv);
    free(launch->envp);
    free(launch->stack);
    free(launch);
}

void close_from(unsigned int first)
{
    if (raw(SYS_close_range, (long)first, (long)UINT_MAX, 0, 0) == 0)
        return;
    for (unsigned int fd = first; fd < 1024; fd++) /* before Linux 5.9 */
        raw(SYS_close, (long)fd, 0, 0, 0);
}

static _Noreturn void give_up(int status_fd, long result, enum launch_stage stage)
{
    struct launch_error error = {.error = (int32_t)-result, .stage = stage};
    raw(SYS_write, status_fd, (long)&error, sizeof error, 0);
    for (;;)
        raw(SYS_exit_group, 127, 0, 0, 0);
}

static const char *search_path(const struct launch *launch)
{
    for (char **entry = launch->envp; *entry; entry++)
        if (strncmp(*entry, "PATH=", 5) == 0)
            return *entry + 5;
    return "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
}

/* execvpe(3) without errno: returns -errno, EACCES rather than ENOENT if one was found but refused. */
static long exec_searching(const struct launch *launch)
{
    const char *name = launch->argv[0];
    size_t name_length = strlen(name);
    if (name_length == 0)
        return -ENOENT;
    if (strchr(name, '/'))
        return raw(SYS_execve, (long)name, (long)launch->argv, (long)launch->envp, 0);
    long seen = -ENOENT;
    for (const char *part = search_path(launch);; part++) {
        char path[PATH_MAX];
        size_t length = (size_t)(strchrnul(part, ':') - part);
        if (length + name_length + 2 <= sizeof path) {
            memcpy(path, part, length);
            memcpy(path + length, "/", 1);
            memcpy(path + length + (length > 0), name, name_length + 1);
            /* Looking first: a failing execve(2) costs milliseconds under emulation. */
            long result = raw(SYS_faccessat, AT_FDCWD, (long)path, X_OK, 0);
            if (result == 0)
                result = raw(SYS_execve, (long)path, (long)launch->argv, (long)launch->envp, 0);
            if (result != -ENOENT && result != -ENOTDIR && result != -EACCES)
                return result;
            if (result == -EACCES)
                seen = result;
        }
        part += length;
        if (!*part)
            return seen;
    }
}

static int become_command(void *argument)
{
    struct launch *launch = argument;
    uint64_t none = 0;
    raw(SYS_setsid, 0, 0, 0, 0);
    for (int fd = 0; fd < 3; fd++)
        raw(SYS_dup3, launch->fds[fd], fd, 0, 0);
    if (launch->pty)
        raw(SYS_ioctl, 0, TIOCSCTTY, 0, 0);
    /* Nobody else's stream may stay open in here while exec hangs: only the status pipe lives on. */
    if (launch->status_fd != 3)
        raw(SYS_dup3, launch->status_fd, 3, O_CLOEXEC, 0);
    close_from(4);
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&none, 0, sizeof none);
    if (*launch->cwd) {
        long result = raw(SYS_chdir, (long)launch->cwd, 0, 0, 0);
        if (result < 0)
            give_up(3, result, STAGE_CWD);
    }
    give_up(3, exec_searching(launch), STAGE_EXEC);
}

/* A user by name or number, from the guest's own files (a static libc can't ask NSS). 0, or an errno. */
int find_user(const char *user, uid_t *uid, gid_t *gid, char *home, size_t home_size, char *name, size_t name_size)
{
    char *rest;
    unsigned long number = strtoul(user, &rest, 10);
    bool numeric = *user >= '0' && *user <= '9' && *rest == 0;
    FILE *file = fopen("/etc/passwd", "re");
    struct passwd *entry = NULL;
    while (file && (entry = fgetpwent(file)) != NULL)
        if (numeric ? entry->pw_uid == number : strcmp(entry->pw_name, user) == 0)
            break;
    if (entry) {
        *uid = entry->pw_uid;
        *gid = entry->pw_gid;
        snprintf(home, home_size, "%s", entry->pw_dir);
        snprintf(name, name_size, "%s", entry->pw_name);
    } else if (numeric && number < UINT32_MAX) { /* a number needs no entry: no name, the group of that number */
        *uid = (uid_t)number;
        *gid = (gid_t)number;
        snprintf(home, home_size, "/");
        *name = 0;
    }
    if (file)
        fclose(file);
    return entry || (numeric && number < UINT32_MAX) ? 0 : ESRCH;
}

int find_group(const char *group, gid_t *gid)
{
    char *rest;
    unsigned long number = strtoul(group, &rest, 10);
    bool numeric = *group >= '0' && *group <= '9' && *rest == 0 && number < UINT32_MAX;
    FILE *file = numeric ? NULL : fopen("/etc/group", "re");
    struct group *entry = NULL;
    while (file && (entry = fgetgrent(file)) != NULL && strcmp(entry->gr_name, group) != 0)
        continue;
    if (numeric || entry)
        *gid = numeric ? (gid_t)number : entry->gr_gid;
    if (file)
        fclose(file);
    return numeric || entry ? 0 : ESRCH;
}

static size_t find_groups(const char *name, gid_t gid, gid_t *groups, size_t room)
{
    size_t count = 0;
    groups[count++] = gid;
    FILE *file = *name ? fopen("/etc/group", "re") : NULL;
    for (struct group *entry; file && (entry = fgetgrent(file)) != NULL;)
        for (char **member = entry->gr_mem; *member && count < room; member++)
            if (strcmp(*member, name) == 0 && entry->gr_gid != gid) {
                groups[count++] = entry->gr_gid;
                break;
            }
    if (file)
        fclose(file);
    return count;
}

static void become_user(struct launch *launch)
{
    static char home[PATH_MAX + 8] = "HOME=", user[300] = "USER=", logname[300] = "LOGNAME=";
    static gid_t groups[1024];
    char name[256];
    uid_t uid;
    gid_t gid;
    int error = find_user(launch->user, &uid, &gid, home + 5, sizeof home - 5, name, sizeof name);
    if (error)
        give_up(launch->status_fd, -error, STAGE_USER);
    size_t count = find_groups(name, gid, groups, sizeof groups / sizeof *groups);
    bool already = geteuid() != 0 && uid == geteuid(); /* asked to be who we are: nothing to change */
    if (!already && (setgroups(count, groups) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid)))
        give_up(launch->status_fd, -errno, STAGE_USER);
    if (launch->home_slot >= 0)
        launch->envp[launch->home_slot] = home;
    if (launch->spare_slot < 0 || !*name)
        return;
    snprintf(user + 5, sizeof user - 5, "%s", name);
    snprintf(logname + 8, sizeof logname - 8, "%s", name);
    if (!names_variable(launch->envp, (size_t)launch->spare_slot, user))
        launch->envp[launch->spare_slot++] = user;
    if (!names_variable(launch->envp, (size_t)launch->spare_slot, logname))
        launch->envp[launch->spare_slot++] = logname;
}

/* The pid, or -errno. Until the status pipe ends, `launch` belongs to the child as well. */
pid_t launch_start(struct launch *launch)
{
    if (!*launch->user) {
        pid_t pid = clone(become_command, launch->stack + STACK_SIZE, CLONE_VM | SIGCHLD, launch);
        return pid < 0 ? -errno : pid;
    }
    pid_t pid = fork();
    if (pid == 0) {
        become_user(launch);
        become_command(launch);
    }
    return pid < 0 ? -errno : pid;
}
