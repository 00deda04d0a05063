package csi

import (
	"reflect"
	"strings"
	"testing"
)

// mountinfo is that of an agent's container: its runtime directory and the kubelet's come from the host.
const mountinfo = `1 0 0:99 / / ro,relatime - overlay overlay rw
20 1 0:25 /meshca-agent /run/meshca-agent rw,nosuid shared:5 - tmpfs tmpfs rw
21 1 8:1 /var/lib/kubelet /var/lib/kubelet rw shared:7 master:1 - ext4 /dev/sda1 rw
22 21 0:25 /meshca-agent/pods/aa/mount /var/lib/kubelet/pods/u1/volumes/kubernetes.io~csi/a/mount ro shared:5 - tmpfs tmpfs rw
23 21 0:25 /meshca-agent/pods/bb/mount//deleted /var/lib/kubelet/pods/u2/volumes/kubernetes.io~csi/a\040b/mount ro - tmpfs tmpfs rw
24 21 0:25 /meshca-agent/podsother/cc/mount /var/lib/kubelet/pods/u3/mount ro - tmpfs tmpfs rw
25 21 0:77 /meshca-agent/pods/dd/mount /var/lib/kubelet/pods/u4/mount ro - tmpfs tmpfs rw
26 1 0:25 /meshca-agent/pods/aa/mount /somewhere/else ro - tmpfs tmpfs rw
`

func TestMountinfo(t *testing.T) {
	all, err := parseMounts(strings.NewReader(mountinfo))
	must(t, err)
	want := []bound{
		{"aa", "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~csi/a/mount"},
		{"bb", "/var/lib/kubelet/pods/u2/volumes/kubernetes.io~csi/a b/mount"},
	}
	if got := boundOf(all, "/run/meshca-agent/pods", "/var/lib/kubelet"); !reflect.DeepEqual(got, want) {
		t.Errorf("ours are %v, want %v", got, want)
	}
	for path, want := range map[string]struct {
		at     string
		shared bool
	}{
		"/var/lib/kubelet":               {"/var/lib/kubelet", true},
		"/var/lib/kubelet/pods/u2":       {"/var/lib/kubelet", true},
		"/var/lib/kubeletx":              {"/", false},
		"/run/meshca-agent/pods/aa":      {"/run/meshca-agent", true},
		"/var/lib/kubelet/pods/u4/mount": {"/var/lib/kubelet/pods/u4/mount", false},
	} {
		if m, ok := over(all, path); !ok || m.at != want.at || m.shared != want.shared {
			t.Errorf("%s lies in %+v", path, m)
		}
	}
	if _, err := parseMounts(strings.NewReader("1 2 3\n")); err == nil {
		t.Error("half a line is taken for a mount")
	}
}
