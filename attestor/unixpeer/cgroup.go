package unixpeer

import (
	"path"
	"strings"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// maxCgroup bounds what is read of /proc/PID/cgroup: cgroup v1 has a line for each of a dozen hierarchies, each with a path.
	maxCgroup = 64 << 10
	// containerID is the length of a container's ID, in hex digits.
	containerID = 64
)

// layout is where a kubelet keeps the control groups of its pods.
type layout struct {
	root  []string // segments of the path above kubepods
	slice string   // what systemd's names of slices begin with below that root: "kubelet-" below kubelet.slice
}

// newLayout reads a kubelet's --cgroup-root: an absolute path, "/" as a rule. It reports whether it is one.
func newLayout(root string) (layout, bool) {
	if !strings.HasPrefix(root, "/") || path.Clean(root) != root || len(root) > 1024 {
		return layout{}, false
	}
	if root == "/" {
		return layout{}, true
	}
	l := layout{root: strings.Split(root[1:], "/")}
	if name, ok := strings.CutSuffix(l.root[len(l.root)-1], ".slice"); ok {
		l.slice = name + "-"
	}
	return l, true
}

// podOf reads a process's /proc/PID/cgroup (cgroups(7)) and returns the UID of its pod. A line whose path leads elsewhere says
// nothing: not every hierarchy of cgroup v1 is the kubelet's. Those that lead to pods must lead to the same one.
func (l layout) podOf(cgroup string) (string, error) {
	pod := ""
	for line := range strings.Lines(cgroup) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		_, where, ok := strings.Cut(rest, ":")
		if !ok || !strings.HasPrefix(where, "/") {
			return "", refusal.New(refusal.PeerUnknown, "its control groups cannot be read: %.100q", line)
		}
		segments := strings.Split(where[1:], "/")
		if strings.HasPrefix(where, "/..") {
			return "", refusal.New(refusal.PeerUnknown, "its control group (%.200q) lies outside of those that the agent sees: the agent must run in the host's cgroup namespace", where)
		}
		below, ok := l.below(segments)
		if !ok {
			continue
		}
		uid, ok := l.parse(below)
		switch {
		case !ok:
			return "", refusal.New(refusal.PeerNotInPod, "its control group %.300q is no container's of a pod", where)
		case pod != "" && pod != uid:
			return "", refusal.New(refusal.PeerUnknown, "its control groups are of two pods, %s and %s", pod, uid)
		}
		pod = uid
	}
	if pod == "" {
		return "", refusal.New(refusal.PeerNotInPod, "none of its control groups is below kubepods in /%s", strings.Join(l.root, "/"))
	}
	return pod, nil
}

// below returns what follows the root, if that is the kubelet's.
func (l layout) below(segments []string) ([]string, bool) {
	if len(segments) <= len(l.root) {
		return nil, false
	}
	for i, s := range l.root {
		if segments[i] != s {
			return nil, false
		}
	}
	segments = segments[len(l.root):]
	return segments, segments[0] == "kubepods" || segments[0] == l.slice+"kubepods.slice"
}

// parse reads kubepods[/QOS]/podUID/CONTAINER, as the kubelet's cgroupfs driver names them, or the same as systemd's slices and
// scope. What follows is the container's own affair.
func (l layout) parse(segments []string) (uid string, ok bool) {
	systemd := segments[0] != "kubepods"
	qos := ""
	if len(segments) > 1 {
		for _, class := range []string{"burstable", "besteffort"} {
			if segments[1] == class && !systemd || systemd && segments[1] == l.slice+"kubepods-"+class+".slice" {
				qos, segments = class, segments[1:]
				break
			}
		}
	}
	if len(segments) < 3 {
		return "", false
	}
	if !systemd {
		uid, ok = strings.CutPrefix(segments[1], "pod")
		return uid, ok && isUID(uid) && (isHex(segments[2], containerID) || isContainer(segments[2], "crio-"))
	}
	prefix := l.slice + "kubepods-pod"
	if qos != "" {
		prefix = l.slice + "kubepods-" + qos + "-pod"
	}
	name, ok := strings.CutPrefix(segments[1], prefix)
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, ".slice")
	scope, scoped := strings.CutSuffix(segments[2], ".scope")
	if !ok || !scoped || strings.Contains(name, "-") {
		return "", false
	}
	uid = strings.ReplaceAll(name, "_", "-") // a dash would be a slice below another
	return uid, isUID(uid) && (isContainer(scope, "cri-containerd-") || isContainer(scope, "crio-") || isContainer(scope, "docker-"))
}

func isContainer(s, prefix string) bool {
	id, ok := strings.CutPrefix(s, prefix)
	return ok && isHex(id, containerID)
}

// isUID tells whether it is a UUID as API servers make them (RFC 9562 §4). Static pods have others, which no API server knows.
func isUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (s[i] == '-') || !dash && !isHexDigit(s[i]) {
			return false
		}
	}
	return true
}

func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range len(s) {
		if !isHexDigit(s[i]) {
			return false
		}
	}
	return true
}

func isHexDigit(c byte) bool { return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' }
