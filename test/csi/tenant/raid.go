package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// raid tries to get at another pod's identity: under its name at the own socket; by paths of the node, seen from wherever
// a container can stand; by changing the own volume; by what the node's programs and the installation's pods listen on.
// Each success is printed, and is a fault; the number of tries is printed last.
func raid(ctx context.Context, p *printer, socket, id string, in installation, paths []string) error {
	r := &raider{say: p.say}
	mine, err := fetch(ctx, socket, own)
	if err != nil {
		return fmt.Errorf("the raider has no identity of its own: %w", err)
	}
	for _, name := range []string{id, "ALL", "spiffe://mesh.test/meshca/server", strings.ToUpper(id), mine.ID + "/../" + filepath.Base(id)} {
		line, err := fetch(ctx, socket, name)
		if err == nil && line.ID == mine.ID {
			err = errors.New("it is one's own")
		}
		r.try("asking for "+name, err)
	}
	r.paths(filepath.Dir(socket), paths)
	r.volume(filepath.Dir(socket))
	r.handles(filepath.Dir(socket))
	r.doors(ctx, in, socket, id)
	if sockets, err := os.ReadFile("/proc/net/unix"); err == nil && strings.Contains(string(sockets), "meshca") {
		r.try("seeing the agent's sockets", nil)
	}
	p.say(Line{What: "raided", ID: mine.ID, Text: fmt.Sprintf("%d tries, %d of them with success", r.tries, r.successes)})
	if r.successes > 0 {
		return fmt.Errorf("%d tries succeeded", r.successes)
	}
	return nil
}

type raider struct {
	say              func(Line)
	tries, successes int
}

func (r *raider) try(what string, err error) {
	r.tries++
	if err == nil {
		r.successes++
		r.say(Line{What: "success", Text: what})
	}
}

// paths opens what is another's, from all places that may lead out of the container.
func (r *raider) paths(volume string, paths []string) {
	places := []string{"/", "/host", volume + "/..", volume + "/../../../../..", "/proc/1/root", "/proc/self/root/..", "/proc/1/cwd", "/dev/fd/../../root"}
	processes, _ := filepath.Glob("/proc/[0-9]*")
	for _, process := range processes {
		places = append(places, process+"/root", process+"/cwd")
	}
	for _, place := range places {
		for _, path := range paths {
			whole := place + path // not cleaned: the kernel is to walk it
			r.try("opening "+whole, open(whole))
		}
	}
}

// open reads a file or a directory, or connects to a socket.
func open(path string) error {
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		return conn.Close()
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.Close()
}

// volume tries to change the own volume, which is a directory of the node's.
func (r *raider) volume(dir string) {
	r.try("making a file", os.WriteFile(dir+"/file", nil, 0o600))
	r.try("making a link", os.Symlink("/run/meshca-agent", dir+"/link"))
	r.try("removing the socket", os.Remove(dir+"/socket"))
	r.try("renaming the socket", os.Rename(dir+"/socket", dir+"/other"))
	r.try("changing the directory's mode", os.Chmod(dir, 0o777))
	r.try("changing the directory's owner", os.Chown(dir, 1000, 1000))
	r.try("making a device", unix.Mknod(dir+"/device", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))))
	r.try("mounting it writable", unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	r.try("unmounting it", unix.Unmount(dir, unix.MNT_DETACH))
	r.try("mounting over it", unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	r.try("a mount namespace", unix.Unshare(unix.CLONE_NEWNS))
	if err := os.Mkdir("/tmp/device", 0o700); err == nil { // a device node that leads to the node's disk
		r.try("reading a device", func() error {
			if err := unix.Mknod("/tmp/device/disk", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))); err != nil {
				return err
			}
			return open("/tmp/device/disk")
		}())
	}
}

// handles opens inodes of the file system that the volume lies on, which holds every other volume, by their numbers.
func (r *raider) handles(dir string) {
	at, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return
	}
	defer unix.Close(at)
	handle, _, err := unix.NameToHandleAt(at, "socket", 0)
	if err != nil {
		r.tries++ // not even a handle
		return
	}
	fd, err := unix.OpenByHandleAt(at, handle, unix.O_PATH)
	if err == nil {
		unix.Close(fd)
	}
	r.try("opening by a handle", err)
}
