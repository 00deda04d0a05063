package csi

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"github.com/meshca/meshca/agent/files"
	"github.com/meshca/meshca/api/refusal"
)

// loads is the identity in the pod's files, as kubernetes.io/tls names them.
func (p *made) loads() (*x509svid.SVID, error) {
	return x509svid.Load(filepath.Join(p.target, "tls.crt"), filepath.Join(p.target, "tls.key"))
}

// TestRealFiles are there before the pod starts, for its fsGroup, follow renewals, live through a restart of the agent and
// go with the pod.
func TestRealFiles(t *testing.T) {
	n := newNode(t)
	n.csi.Writer = files.NewVolumes(nil)
	n.start()
	web, bare := n.pod("web"), n.pod("bare")
	web.group = "2000"
	for _, p := range []*made{web, bare} {
		p.attributes["files"] = "tls,credentialbundle"
		must(t, p.publish())
		svid, err := p.loads()
		must(t, err)
		if svid.ID.String() != p.id {
			t.Errorf("%s has the files of %s", p.name, svid.ID)
		}
	}
	for path, want := range map[string]struct {
		mode os.FileMode
		gid  int
	}{
		filepath.Join(web.target, "tls.key"): {0o640, 2000}, filepath.Join(web.target, "ca.crt"): {0o644, 2000},
		filepath.Join(web.target, "credentialbundle.pem"): {0o640, 2000}, filepath.Join(bare.target, "tls.key"): {0o644, 0},
	} {
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		if info, err := os.Stat(path); err != nil || info.Mode() != want.mode || int(st.Gid) != want.gid {
			t.Errorf("%s: mode %v, group %d, error %v; want %v and %d", path, info.Mode(), st.Gid, err, want.mode, want.gid)
		}
	}
	before, err := web.loads()
	must(t, err)
	n.halt()
	n.start()
	if svid, err := web.loads(); err != nil || svid.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		t.Errorf("after the agent's restart the files are others: %v", err)
	}
	// Until a pod's files have a bundle, its node has not got it.
	inTheWay := filepath.Join(web.dir(), "mount", "ca.crt")
	must(t, os.Remove(inTheWay))
	must(t, os.WriteFile(inTheWay, nil, 0o600))
	must(t, n.ca.AddRoot())
	eventually(t, "the other pod's files have a new root", func() bool {
		bundle, err := os.ReadFile(filepath.Join(bare.target, "ca.crt"))
		return err == nil && strings.Count(string(bundle), "BEGIN CERTIFICATE") == 2
	})
	acked := func() bool { return slices.Contains(n.ca.Seen().Acks, 2) }
	time.Sleep(300 * time.Millisecond)
	if acked() {
		t.Error("a bundle was acknowledged that a pod's files lack")
	}
	must(t, os.Remove(inTheWay))
	eventually(t, "the bundle is acknowledged", acked)
	eventually(t, "a new root is in the files", func() bool {
		bundle, err := os.ReadFile(filepath.Join(web.target, "ca.crt"))
		return err == nil && strings.Count(string(bundle), "BEGIN CERTIFICATE") == 2
	})
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	if _, err := bare.loads(); err != nil {
		t.Errorf("another pod's files: %v", err)
	}
}

// TestFilesThatCannotBeWritten keep the pod waiting, and its events say why.
func TestFilesThatCannotBeWritten(t *testing.T) {
	n := newNode(t)
	n.csi.Writer, n.csi.Timeout = files.NewVolumes(nil), 2*time.Second
	n.start()
	web := n.pod("web")
	web.attributes["files"], web.attributes["filesMode"] = "tls", "0666"
	if err := web.publish(); refusal.Of(err) != refusal.VolumeInvalid || !strings.Contains(err.Error(), "lets others write the key") {
		t.Errorf("a mode that no key may have: %v", err)
	}
	delete(web.attributes, "filesMode")
	inside := filepath.Join(web.dir(), "mount")
	must(t, os.MkdirAll(inside, 0o755))
	must(t, os.WriteFile(filepath.Join(inside, "tls.key"), nil, 0o600))
	err := web.publish()
	if refusal.Of(err) != refusal.SVIDPending || !strings.Contains(err.Error(), "pod shop/web (service account web)") ||
		!strings.Contains(err.Error(), "its files cannot be written yet") || !strings.Contains(err.Error(), "this agent did not make") || strings.Contains(err.Error(), "\n") {
		t.Errorf("the event says %v", err)
	}
	must(t, os.Remove(filepath.Join(inside, "tls.key")))
	eventually(t, "the kubelet's next try succeeds", func() bool { return web.publish() == nil })
	must(t, web.unpublish())
	if _, err := web.loads(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the files stay: %v", err)
	}
}
