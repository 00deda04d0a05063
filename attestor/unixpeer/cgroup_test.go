package unixpeer

import (
	"strings"
	"testing"

	"github.com/meshca/meshca/api/refusal"
)

const (
	uidA = "0f0e0d0c-1111-4222-8333-444455556666"
	uidB = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
)

var (
	id     = strings.Repeat("0a", 32)
	sliceA = strings.ReplaceAll(uidA, "-", "_")
)

func TestPodOf(t *testing.T) {
	v2 := func(path string) string { return "0::" + path + "\n" }
	for name, c := range map[string]struct {
		root, text, want string
		no               refusal.Reason
	}{
		"cgroupfs, guaranteed":       {"/", v2("/kubepods/pod" + uidA + "/" + id), uidA, ""},
		"cgroupfs, burstable":        {"/", v2("/kubepods/burstable/pod" + uidA + "/" + id), uidA, ""},
		"cgroupfs, best effort":      {"/", v2("/kubepods/besteffort/pod" + uidA + "/" + id), uidA, ""},
		"cgroupfs, CRI-O":            {"/", v2("/kubepods/besteffort/pod" + uidA + "/crio-" + id), uidA, ""},
		"systemd, guaranteed":        {"/", v2("/kubepods.slice/kubepods-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), uidA, ""},
		"systemd, burstable":         {"/", v2("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), uidA, ""},
		"systemd, CRI-O with crun":   {"/", v2("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + sliceA + ".slice/crio-" + id + ".scope/container"), uidA, ""},
		"systemd, docker":            {"/", v2("/kubepods.slice/kubepods-pod" + sliceA + ".slice/docker-" + id + ".scope"), uidA, ""},
		"systemd, a root of its own": {"/kubelet.slice", v2("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), uidA, ""},
		"cgroupfs, a root below":     {"/a/b", v2("/a/b/kubepods/pod" + uidA + "/" + id), uidA, ""},
		"cgroup v1": {"/", "12:pids:/kubepods/burstable/pod" + uidA + "/" + id + "\n11:cpu,cpuacct:/kubepods/burstable/pod" + uidA + "/" + id +
			"\n3:rdma:/\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/" + id + "\n0::/system.slice/containerd.service\n", uidA, ""},

		"a nested one of another's name": {"/", v2("/kubepods/pod" + uidA + "/" + id + "/kubepods/pod" + uidB + "/" + id), uidA, ""},
		"a nested one, systemd":          {"/", v2("/kubepods.slice/kubepods-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope/kubepods.slice/kubepods-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice/cri-containerd-" + id + ".scope"), uidA, ""},
		"deeper than the root":           {"/", v2("/system.slice/kubepods/pod" + uidA + "/" + id), "", refusal.PeerNotInPod},
		"a user's own":                   {"/", v2("/user.slice/user-1000.slice/kubepods/pod" + uidA + "/" + id), "", refusal.PeerNotInPod},
		"a name that begins alike":       {"/", v2("/kubepods2/pod" + uidA + "/" + id), "", refusal.PeerNotInPod},
		"a root that begins alike":       {"/a", v2("/ab/kubepods/pod" + uidA + "/" + id), "", refusal.PeerNotInPod},
		"the root is elsewhere":          {"/kubelet", v2("/kubepods/pod" + uidA + "/" + id), "", refusal.PeerNotInPod},
		"a host's process":               {"/", v2("/init.scope"), "", refusal.PeerNotInPod},
		"the root itself":                {"/", v2("/"), "", refusal.PeerNotInPod},
		"kubepods itself":                {"/", v2("/kubepods"), "", refusal.PeerNotInPod},
		"the pod, no container":          {"/", v2("/kubepods/pod" + uidA), "", refusal.PeerNotInPod},
		"the runtime's monitor":          {"/", v2("/kubepods.slice/kubepods-pod" + sliceA + ".slice/crio-conmon-" + id + ".scope"), "", refusal.PeerNotInPod},
		"a short container":              {"/", v2("/kubepods/pod" + uidA + "/" + id[1:]), "", refusal.PeerNotInPod},
		"a removed container":            {"/", v2("/kubepods/pod" + uidA + "/" + id + " (deleted)"), "", refusal.PeerNotInPod},
		"a static pod":                   {"/", v2("/kubepods/pod" + strings.Repeat("ab", 16) + "/" + id), "", refusal.PeerNotInPod},
		"capitals":                       {"/", v2("/kubepods/pod" + strings.ToUpper(uidA) + "/" + id), "", refusal.PeerNotInPod},
		"slices within cgroupfs":         {"/", v2("/kubepods/kubepods-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), "", refusal.PeerNotInPod},
		"another class's slice":          {"/", v2("/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), "", refusal.PeerNotInPod},
		"dashes in a slice":              {"/", v2("/kubepods.slice/kubepods-pod" + uidA + ".slice/cri-containerd-" + id + ".scope"), "", refusal.PeerNotInPod},
		"no scope":                       {"/", v2("/kubepods.slice/kubepods-pod" + sliceA + ".slice/" + id), "", refusal.PeerNotInPod},
		"two pods":                       {"/", "2:pids:/kubepods/pod" + uidA + "/" + id + "\n1:cpu:/kubepods/pod" + uidB + "/" + id + "\n", "", refusal.PeerUnknown},
		"another cgroup namespace":       {"/", v2("/../../kubepods-burstable.slice/kubepods-burstable-pod" + sliceA + ".slice/cri-containerd-" + id + ".scope"), "", refusal.PeerUnknown},
		"nothing":                        {"/", "", "", refusal.PeerNotInPod},
		"no cgroup file":                 {"/", "hello\n", "", refusal.PeerUnknown},
		"a relative path":                {"/", "0::kubepods/pod" + uidA + "/" + id, "", refusal.PeerUnknown},
	} {
		l, ok := newLayout(c.root)
		if !ok {
			t.Fatalf("%s: the root is none", name)
		}
		if got, err := l.podOf(c.text); got != c.want || refusal.Of(err) != c.no {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	for _, root := range []string{"", "kubelet", "/a/", "/a/../b", "/" + strings.Repeat("a", 2000)} {
		if _, ok := newLayout(root); ok {
			t.Errorf("%.20q is a root", root)
		}
	}
}

// Whatever the text is, what comes out is a UID that stands, in one of its two spellings, as the first pod below the root.
func FuzzPodOf(f *testing.F) {
	for _, root := range []string{"/", "/kubelet.slice", "/a/b"} {
		f.Add(root, "0::/kubepods/burstable/pod"+uidA+"/"+id+"\n")
		f.Add(root, "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod"+sliceA+".slice/crio-"+id+".scope\n")
		f.Add(root, "3:pids:/a/b/kubepods/pod"+uidA+"/"+id+"/kubepods/pod"+uidB+"/"+id+"\n2:cpu:/\n0::/../x\n")
	}
	f.Fuzz(func(t *testing.T, root, text string) {
		l, ok := newLayout(root)
		if !ok {
			return
		}
		uid, err := l.podOf(text)
		if (err == nil) != isUID(uid) {
			t.Fatalf("%q, %v", uid, err)
		}
		if err != nil {
			if !refusal.Of(err).Known() || len(err.Error()) > 2000 {
				t.Fatal(err)
			}
			return
		}
		prefix := strings.TrimSuffix(root, "/") + "/"
		for line := range strings.Lines(text) {
			path := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)[2]
			below, ok := strings.CutPrefix(path, prefix)
			if !ok || !strings.HasPrefix(below, "kubepods/") && !strings.HasPrefix(below, l.slice+"kubepods.slice/") {
				continue
			}
			first := strings.Index(below, "pod"+uid)
			if first < 0 {
				first = strings.Index(below, "pod"+strings.ReplaceAll(uid, "-", "_"))
			}
			if first < 0 || strings.Count(below[:first], "/") > 2 {
				t.Fatalf("%s is not the first pod of %q", uid, path)
			}
		}
	})
}
