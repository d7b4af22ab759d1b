/* A guest for the tests of images alone: loads what the image lists, then runs commands that come
 * over the virtio-serial port, one at a time. The real agent is tested elsewhere. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

static char release[256];

static void load_boot_modules(void)
{
	char line[512], path[1024];
	FILE *list = fopen("/etc/vmsandbox/modules", "r");

	while (list && fgets(line, sizeof(line), list)) {
		line[strcspn(line, "\n")] = 0;
		snprintf(path, sizeof(path), "/lib/modules/%s/%s", release, line);
		int fd = open(path, O_RDONLY);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0)
			fprintf(stderr, "boot_init: %s did not load: %m\n", path);
		close(fd);
	}
	if (list)
		fclose(list);
}

/* Open /dev/X for the X below `directory` whose `attribute` is `wanted`. */
static int find(const char *directory, const char *attribute, const char *wanted, char *device)
{
	DIR *all = opendir(directory);
	struct dirent *entry;
	int found = 0;

	while (!found && all && (entry = readdir(all))) {
		char path[1024], text[64] = "";
		snprintf(path, sizeof(path), "%s/%s/%s", directory, entry->d_name, attribute);
		int fd = open(path, O_RDONLY);
		if (fd < 0)
			continue;
		if (read(fd, text, sizeof(text) - 1) < 0)
			text[0] = 0;
		close(fd);
		text[strcspn(text, "\n")] = 0;
		if ((found = !strcmp(text, wanted)))
			snprintf(device, 300, "/dev/%s", entry->d_name);
	}
	if (all)
		closedir(all);
	return found;
}

int main(void)
{
	struct utsname names;
	char device[300], command[4096];
	ssize_t length;

	uname(&names);
	strcpy(release, names.release);
	mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
	mount("proc", "/proc", "proc", 0, 0);
	mount("sysfs", "/sys", "sysfs", 0, 0);
	load_boot_modules();
	setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
	for (int tries = 0; tries < 1000; tries++, usleep(5000))
		if (find("/sys/class/virtio-ports", "name", "vmsandbox.agent", device))
			break;
	int port = open(device, O_RDWR);
	dprintf(port, "HELLO %s\n", release);
	if (find("/sys/block", "serial", "vmsandbox-mods", device))
		mount(device, "/lib/modules", "ext4", MS_RDONLY, 0);
	while ((length = read(port, command, sizeof(command) - 1)) > 0) {
		int status = 0;
		command[length] = 0;
		if (!fork()) {
			dup2(port, 1);
			dup2(port, 2);
			execl("/bin/sh", "sh", "-c", command, NULL);
			_exit(127);
		}
		wait(&status);
		dprintf(port, "\nEXIT %d\n", WEXITSTATUS(status));
	}
	reboot(RB_POWER_OFF);
	return 1;
}
