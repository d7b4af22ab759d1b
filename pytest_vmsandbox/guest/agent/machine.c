/*
 * What belongs to the machine as a whole: what pid 1 does for it, and what a restore changes in it.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TERM_GRACE_MS = 2000, KILL_GRACE_MS = 1000, SYNC_GRACE_MS = 10000, PORT_WAIT_MS = 2, ENTROPY_MAX = 512 };

static const char PORT_NAME[] = "vmsandbox.agent";
static const char MODULES_SERIAL[] = "vmsandbox-mods";
static const char MACHINE_ID[] = "/etc/machine-id";
static const char MACHINE_ID_COVER[] = "/run/machine-id";

struct facts facts;
static bool set_up_by_us; /* only then are the mounts ours to take off, and the root's to remount */

void console_note(const char *what, const char *detail, int error)
{
    dprintf(2, "agent: %s %s%s%s\n", what, detail, error ? ": " : "", error ? strerror(error) : "");
}

/* The first line of a small file, without its newline; false if there is none. */
static bool read_line(const char *path, char *line, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t count = fd < 0 ? -1 : read(fd, line, size - 1);
    if (fd >= 0)
        close(fd);
    if (count <= 0)
        return false;
    line[count] = 0;
    line[strcspn(line, "\n")] = 0;
    return true;
}

static void mount_quietly(const char *type, const char *target, unsigned long flags, const char *data)
{
    mkdir(target, 0755);
    /* EBUSY: the kernel, or an initramfs, was there first. ENODEV: this kernel lacks it. */
    if (mount(type, target, type, flags, data) < 0 && errno != EBUSY && errno != ENODEV)
        console_note("mount", target, errno);
}

static void mount_all(void)
{
    const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;
    mount_quietly("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
    mount_quietly("proc", "/proc", plain, NULL);
    mount_quietly("sysfs", "/sys", plain, NULL);
    mount_quietly("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5");
    mount_quietly("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_quietly("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
    mount_quietly("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_quietly("cgroup2", "/sys/fs/cgroup", plain, NULL);
    (void)!symlink("/proc/self/fd", "/dev/fd");
    (void)!symlink("/proc/self/fd/0", "/dev/stdin");
    (void)!symlink("/proc/self/fd/1", "/dev/stdout");
    (void)!symlink("/proc/self/fd/2", "/dev/stderr");
}

static void load_module(const char *release, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "/lib/modules/%s/%s", release, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
        console_note("module", name, errno);
    if (fd >= 0)
        close(fd);
}

static void load_modules(void)
{
    char line[256];
    struct utsname name;
    FILE *list = fopen("/etc/vmsandbox/modules", "re");
    uname(&name);
    while (list && fgets(line, sizeof line, list)) {
        line[strcspn(line, "\n")] = 0;
        if (*line && *line != '#')
            load_module(name.release, line);
    }
    if (list)
        fclose(list);
}

static void raise_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        console_note("interface", "lo", errno);
    if (fd >= 0)
        close(fd);
}

/* The name that udev gives a disk, for images that have none. */
static void link_disk(const char *disk, const char *serial)
{
    char target[300], path[80];
    if (!*serial || strchr(serial, '/'))
        return;
    snprintf(target, sizeof target, "../../%s", disk);
    snprintf(path, sizeof path, "/dev/disk/by-id/virtio-%s", serial);
    mkdir("/dev/disk", 0755);
    mkdir("/dev/disk/by-id", 0755);
    if (symlink(target, path) < 0 && errno != EEXIST)
        console_note("link", path, errno);
}

/* The rest of the modules lie on a disk of their own, so that they need not be unpacked at boot. */
void machine_find_disks(void)
{
    DIR *disks = opendir("/sys/block");
    for (struct dirent *disk; disks && (disk = readdir(disks)) != NULL;) {
        char path[300], serial[32];
        snprintf(path, sizeof path, "/sys/block/%s/serial", disk->d_name);
        if (*disk->d_name == '.' || !read_line(path, serial, sizeof serial))
            continue;
        link_disk(disk->d_name, serial);
        if (strcmp(serial, MODULES_SERIAL) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", disk->d_name);
        if (mount(path, "/lib/modules", "ext4", MS_RDONLY, "noload") < 0)
            console_note("mount", "/lib/modules", errno);
    }
    if (disks)
        closedir(disks);
}

/* In place: no reader ever finds it empty, and a file of the same length need not grow. */
static int put_machine_id(const char *path, const char *hex)
{
    char line[64];
    int length = snprintf(line, sizeof line, "%s\n", hex);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0444);
    struct stat there;
    int error = 0;
    if (fd < 0 || length >= (int)sizeof line || pwrite(fd, line, (size_t)length, 0) != length ||
        fstat(fd, &there) < 0 || (there.st_size != length && ftruncate(fd, length) < 0))
        error = fd >= 0 && length >= (int)sizeof line ? EINVAL : errno;
    if (fd >= 0)
        close(fd);
    return error;
}

/*
 * Where the root can't be written to, a file of /run covers the one that is there, as systemd does it
 * (systemd-machine-id-commit.service(8)). A later id goes into that file: it is what lies there then.
 */
static int write_machine_id(const char *hex)
{
    int error = put_machine_id(MACHINE_ID, hex);
    if (error != EROFS || put_machine_id(MACHINE_ID_COVER, hex) != 0)
        return error;
    return mount(MACHINE_ID_COVER, MACHINE_ID, NULL, MS_BIND, NULL) < 0 ? error : 0;
}

/* An image is the same for all machines: what names one is made when it starts (machine-id(5)). */
static void give_machine_id(void)
{
    char there[64], uuid[64], id[33];
    size_t length = 0;
    if (read_line(MACHINE_ID, there, sizeof there) || !read_line("/proc/sys/kernel/random/uuid", uuid, sizeof uuid))
        return;
    for (const char *from = uuid; *from && length < 32; from++)
        if (*from != '-')
            id[length++] = *from;
    id[length] = 0;
    int error = write_machine_id(id);
    if (error)
        console_note("write", MACHINE_ID, error);
}

/* Everything that pid 1 owes the machine before it looks for the host. */
void machine_start(void)
{
    set_up_by_us = true;
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/root", 1);
    setenv("TERM", "linux", 1);
    mount_all();
    reboot(RB_DISABLE_CAD); /* ctrl-alt-del becomes a SIGINT to us */
    struct utsname name;
    if (uname(&name) == 0 && (strcmp(name.nodename, "(none)") == 0 || strcmp(name.nodename, "localhost") == 0))
        (void)!sethostname("vm", 2);
    load_modules();
    raise_loopback();
    give_machine_id();
    machine_find_disks(); /* may move behind the hello: before the first spawn is early enough */
}

void machine_facts(const char *nonce)
{
    char line[4096];
    read_line("/proc/sys/kernel/random/boot_id", facts.boot_id, sizeof facts.boot_id);
    if (!nonce && read_line("/proc/cmdline", line, sizeof line)) {
        char *found = strstr(line, "vmsandbox.nonce=");
        if (found)
            nonce = found + strlen("vmsandbox.nonce=");
    }
    if (nonce)
        snprintf(facts.nonce, sizeof facts.nonce, "%.*s", (int)strcspn(nonce, " "), nonce);
}

static int open_named_port(void)
{
    DIR *ports = opendir("/sys/class/virtio-ports");
    int fd = -1;
    for (struct dirent *port; fd < 0 && ports && (port = readdir(ports)) != NULL;) {
        char path[300], name[64];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port->d_name);
        if (*port->d_name == '.' || !read_line(path, name, sizeof name) || strcmp(name, PORT_NAME) != 0)
            continue;
        snprintf(path, sizeof path, "/dev/%s", port->d_name);
        fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
    }
    if (ports)
        closedir(ports);
    return fd;
}

/* Waits for the port as long as it takes, reaping orphans meanwhile; says so once. */
int machine_find_port(void)
{
    const struct timespec pause = {.tv_nsec = PORT_WAIT_MS * 1000000L};
    for (unsigned int tries = 0;; tries++) {
        int fd = open_named_port();
        if (fd >= 0)
            return fd;
        if (tries == 5000)
            console_note("still waiting for the port", PORT_NAME, 0);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            continue;
        nanosleep(&pause, NULL);
    }
}

static int set_clock(uint64_t unix_ns)
{
    struct timespec now = {.tv_sec = (time_t)(unix_ns / 1000000000u), .tv_nsec = (long)(unix_ns % 1000000000u)};
    return clock_settime(CLOCK_REALTIME, &now) < 0 ? errno : 0;
}

static int reseed(const unsigned char *entropy, size_t length)
{
    union { /* the kernel's struct ends in an array without a length */
        struct rand_pool_info info;
        unsigned char room[sizeof(struct rand_pool_info) + ENTROPY_MAX];
    } pool;
    if (length > ENTROPY_MAX)
        return EINVAL;
    pool.info.entropy_count = (int)length * 8;
    pool.info.buf_size = (int)length;
    memcpy(pool.info.buf, entropy, length);
    int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    int error = 0;
    if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool.info) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0)
        error = errno;
    if (fd >= 0)
        close(fd);
    return error;
}

/*
 * Here and now, not in a child: a restored machine has nothing else to do before it is itself, and a
 * fork would cost it more than all the rest.
 */
struct refusal machine_individualize(const struct identity *identity)
{
    bool asked = *identity->hostname || *identity->machine_id || identity->unix_ns || identity->entropy_length;
    int error = 0;
    if (asked && !facts.owns_machine)
        return (struct refusal){EPERM, "this agent does not own its machine"};
    if (identity->unix_ns && (error = set_clock(identity->unix_ns)) != 0)
        return (struct refusal){error, "clock"};
    if (identity->entropy_length && (error = reseed(identity->entropy, identity->entropy_length)) != 0)
        return (struct refusal){error, "entropy"};
    if (*identity->hostname && sethostname(identity->hostname, strlen(identity->hostname)) < 0)
        return (struct refusal){errno, "hostname"};
    if (*identity->machine_id && (error = write_machine_id(identity->machine_id)) != 0)
        return (struct refusal){error, MACHINE_ID};
    return (struct refusal){0, ""};
}

/* Power: as pid 1 step by step, from the loop; otherwise whoever is init is asked. */

static enum { UP, TERMINATING, KILLING, SYNCING } stage;
static enum power wanted;
static struct timespec stage_began;
static pid_t syncer;

static void enter(int next)
{
    stage = next;
    clock_gettime(CLOCK_MONOTONIC, &stage_began);
}

static long stage_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec - stage_began.tv_sec) * 1000 + (now.tv_nsec - stage_began.tv_nsec) / 1000000;
}

static _Noreturn void power_now(void)
{
    reboot(wanted == POWER_REBOOT ? RB_AUTOBOOT : RB_POWER_OFF);
    reboot(RB_HALT_SYSTEM); /* no way to power off here: at least stand still */
    for (;;)
        pause();
}

/* Later mounts first, so that what is mounted on another mount comes off before it. */
static void unmount_all(void)
{
    static char targets[256][256];
    int count = 0;
    char line[1024];
    FILE *mounts = fopen("/proc/mounts", "re");
    while (mounts && count < 256 && fgets(line, sizeof line, mounts))
        if (sscanf(line, "%*s %255s", targets[count]) == 1)
            count++;
    if (mounts)
        fclose(mounts);
    while (count-- > 0)
        if (strncmp(targets[count], "/proc", 5) != 0 && strncmp(targets[count], "/dev", 4) != 0 &&
            strncmp(targets[count], "/sys", 4) != 0)
            umount2(targets[count], UMOUNT_NOFOLLOW);
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
}

void machine_power(enum power how)
{
    wanted = how;
    if (!facts.is_init) {
        if (fork() == 0) {
            execlp(how == POWER_REBOOT ? "reboot" : "poweroff", how == POWER_REBOOT ? "reboot" : "poweroff", NULL);
            _exit(127);
        }
        return;
    }
    if (stage != UP)
        return;
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);
    enter(TERMINATING);
}

static bool has_children(void)
{
    siginfo_t seen;
    return waitid(P_ALL, 0, &seen, WEXITED | WNOHANG | WNOWAIT) == 0;
}

static bool syncer_is_done(void) { return kill(syncer, 0) < 0; }

/* Called by the loop: milliseconds until it wants to be called again, -1 when nothing is under way. */
int machine_power_step(void)
{
    if (stage == UP)
        return -1;
    if (stage == TERMINATING && (!has_children() || stage_ms() > TERM_GRACE_MS)) {
        kill(-1, SIGKILL);
        enter(KILLING);
    }
    if (stage == KILLING && (!has_children() || stage_ms() > KILL_GRACE_MS)) {
        syncer = fork();
        if (syncer == 0) {
            if (set_up_by_us) {
                sync();
                unmount_all();
            }
            _exit(0);
        }
        enter(SYNCING);
    }
    if (stage == SYNCING && (syncer < 0 || syncer_is_done() || stage_ms() > SYNC_GRACE_MS))
        power_now();
    return 10;
}
