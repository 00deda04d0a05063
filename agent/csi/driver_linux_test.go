package csi

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
)

func TestAPodHasItsIdentityBeforeItStarts(t *testing.T) {
	n := newNode(t)
	n.start()
	web, db := n.pod("web"), n.pod("db")
	web.group = "2000"
	must(t, web.publish())
	if web.sees() == "" {
		t.Fatal("the call returned, and nothing is served")
	}
	must(t, db.publish())
	stranger := *db
	stranger.id = web.id
	if stranger.sees() != "" {
		t.Error("a pod is served another's identity")
	}

	for path, want := range map[string]struct {
		mode os.FileMode
		gid  int
	}{
		n.csi.Dir: {os.ModeDir | 0o700, 0}, web.dir(): {os.ModeDir | 0o700, 0}, filepath.Join(web.dir(), "token"): {0o600, 0},
		filepath.Join(web.dir(), "state.json"): {0o600, 0}, web.target: {os.ModeDir | 0o755, 2000},
		filepath.Join(web.target, "socket"): {os.ModeSocket | 0o666, 2000}, filepath.Join(db.target, "socket"): {os.ModeSocket | 0o666, 0},
	} {
		var st unix.Stat_t
		must(t, unix.Stat(path, &st))
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode() != want.mode || int(st.Gid) != want.gid {
			t.Errorf("%s has mode %v and group %d, want %v and %d", path, info.Mode(), st.Gid, want.mode, want.gid)
		}
	}
	keys := n.kept()
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 || n.kept() != keys-1 {
		t.Errorf("left are %v, and %d of %d keys", left, n.kept(), keys)
	}
	must(t, web.unpublish())
	if db.sees() == "" {
		t.Error("the other pod is served no longer")
	}
}

// TestThePodCannotWrite: its directory lies on the node's own tmpfs.
func TestThePodCannotWrite(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	for what, err := range map[string]error{
		"making a file":         os.WriteFile(filepath.Join(web.target, "file"), []byte("x"), 0o600),
		"making a directory":    os.Mkdir(filepath.Join(web.target, "dir"), 0o700),
		"removing the socket":   os.Remove(filepath.Join(web.target, "socket")),
		"chmod of the socket":   os.Chmod(filepath.Join(web.target, "socket"), 0o777),
		"linking another place": os.Symlink("/", filepath.Join(web.target, "link")),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
	var st unix.Statfs_t
	must(t, unix.Statfs(web.target, &st))
	if want := int64(unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC); st.Flags&want != want {
		t.Errorf("mounted with flags %x", st.Flags)
	}
}

func TestTokensAmongTheSecretsCountFirst(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	r := web.request()
	r.Secrets = map[string]string{keyTokens: tokens(Audience, web.token)}
	r.VolumeContext[keyTokens] = tokens(Audience, "of-the-pods-author")
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r)
	must(t, err)
	if web.sees() == "" {
		t.Error("nothing is served")
	}
}

func TestAFinalRefusalIsToldAtOnce(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	n.refuse(web, refusal.New(refusal.PolicyDenied, "rule no-web denies shop/web"))
	err := web.publish()
	if status.Code(err) != codes.PermissionDenied || refusal.Of(err) != refusal.PolicyDenied {
		t.Fatalf("the call says %v", err)
	}
	// The kubelet makes an event of it: whose it is, which reason, and what of this very case.
	for _, want := range []string{"pod shop/web (service account web)", "POLICY_DENIED", "rule no-web denies shop/web"} {
		if !strings.Contains(status.Convert(err).Message(), want) {
			t.Errorf("%q lacks %q", status.Convert(err).Message(), want)
		}
	}
	if left := web.left(); len(left) > 0 || n.kept() > 0 {
		t.Errorf("left are %v; a kubelet does not come back after a final answer", left)
	}
	n.ca.Refuse(nil)
	must(t, web.publish())
	if web.sees() == "" {
		t.Error("nothing is served after policy was mended")
	}
}

func TestAPassingFaultIsWaitedFor(t *testing.T) {
	n := newNode(t)
	n.csi.Timeout = 2 * time.Second
	n.ca.Stop()
	n.start()
	web := n.pod("web")
	err := web.publish()
	if status.Code(err) != codes.Unavailable || refusal.Of(err) != refusal.SVIDPending || !strings.Contains(err.Error(), "pod shop/web (service account web) has no SVID yet, after 2s: SVID_PENDING: the agent has no SVID of its own to ask with: CA_UNREACHABLE") {
		t.Fatalf("the call says %v", err)
	}
	if _, err := os.Lstat(web.target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pod would find a volume without an identity: %v", err)
	}
	_, err = n.ca.Start()
	must(t, err)
	eventually(t, "the kubelet's next try succeeds", func() bool { return web.publish() == nil })
	if web.sees() == "" {
		t.Error("nothing is served")
	}
}

// TestTheKubeletsTimeIsKept: a call that the kubelet gave up is one whose answer nobody hears.
func TestTheKubeletsTimeIsKept(t *testing.T) {
	n := newNode(t)
	n.ca.Stop()
	n.start()
	web := n.pod("web")
	ctx, cancel := context.WithTimeout(t.Context(), margin+2*time.Second)
	defer cancel()
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(ctx, web.request())
	if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
		t.Errorf("the call says %v, the kubelet's time %v", err, ctx.Err())
	}
}

func TestAnOptionalVolumeWaitsForNothing(t *testing.T) {
	n := newNode(t)
	n.ca.Stop()
	n.start()
	web := n.pod("web")
	web.attributes[attributeOptional] = "true"
	must(t, web.publish())
	if info, err := os.Stat(filepath.Join(web.target, "socket")); err != nil || info.Mode()&os.ModeSocket == 0 {
		t.Fatalf("there is no socket: %v", err)
	}
	_, err := n.ca.Start()
	must(t, err)
	if web.sees() == "" {
		t.Error("the identity never comes")
	}
}

// TestARepublishNeverFails, whatever is wrong: kubelets would take the running pod's volume apart.
func TestARepublishNeverFails(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	before := web.sees()

	r := web.request()
	delete(r.VolumeContext, keyTokens)
	_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r)
	must(t, err)
	if s := n.driver.Standing(); len(s.Faults) != 1 || refusal.Of(s.Faults[0]) != refusal.VolumeInvalid {
		t.Errorf("the fault is not shown: %v", s.Faults)
	}
	if log := n.log.String(); !strings.Contains(log, "passed no token") {
		t.Error("the fault is not logged")
	}
	_, err = csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: web.volume, TargetPath: web.target})
	must(t, err)
	must(t, web.publish())
	if s := n.driver.Standing(); len(s.Faults) != 0 {
		t.Errorf("the fault is shown still: %v", s.Faults)
	}
	n.refuse(web, refusal.New(refusal.TokenRejected, "the test says so"))
	web.freshToken(2)
	must(t, web.publish())
	n.ca.Stop()
	web.freshToken(3)
	must(t, web.publish())
	if saved, err := os.ReadFile(filepath.Join(web.dir(), "token")); err != nil || string(saved) != web.token {
		t.Errorf("the fresh token is not in use: %v", err)
	}
	if web.sees() != before {
		t.Error("what was held is served no longer")
	}
	must(t, unix.Unmount(web.target, 0))
	_, err = csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r) // without a token: as a first mount it would fail
	must(t, err)
	if web.sees() != before {
		t.Error("what somebody unmounted is not mounted again")
	}
	must(t, os.RemoveAll(web.dir()))
	must(t, web.publish())
	if _, err := os.Stat(filepath.Join(web.dir(), "token")); err != nil {
		t.Errorf("what somebody removed is not made again: %v", err)
	}
}

// A fault of our own is no other than those of others: a panic in a republish is for the log and the checks.
func TestARepublishOutlastsAPanic(t *testing.T) {
	n := newNode(t)
	broken := false
	n.label = func(string) error {
		if broken {
			panic("a-token-in-a-panic")
		}
		return nil
	}
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	broken = true
	must(t, unix.Unmount(web.target, 0)) // it is labelled anew
	must(t, web.publish())
	if s := n.driver.Standing(); len(s.Faults) != 1 || refusal.Of(s.Faults[0]) != refusal.Internal {
		t.Errorf("the fault is not shown: %v", s.Faults)
	}
	if log := n.log.String(); !strings.Contains(log, "a fault of the agent's own") || strings.Contains(log, "a-token-in-a-panic") {
		t.Errorf("the log has %s", log)
	}
	if err := n.pod("db").publish(); refusal.Of(err) != refusal.Internal { // nobody uses that one yet
		t.Errorf("a volume that was not made: %v", err)
	}
	broken = false
	must(t, web.publish())
	if s := n.driver.Standing(); len(s.Faults) != 0 || web.sees() == "" {
		t.Errorf("the next one mends nothing: %v", s.Faults)
	}
}

// Pods that run keep their volumes, and can end, where the agent is started with another directory for the kubelet's.
func TestTheKubeletsDirectoryIsAnother(t *testing.T) {
	n := newNode(t)
	n.start()
	web, db := n.pod("web"), n.pod("db")
	must(t, web.publish())
	n.halt()
	must(t, os.Mkdir(n.path("other"), 0o755))
	socket, registration := n.path("kubelet/plugins/csi.meshca.io/csi.sock"), n.path("kubelet/plugins_registry")
	n.csi.KubeletDir, n.csi.Socket, n.csi.RegistrationDir = n.path("other"), socket, registration
	n.start()
	web.freshToken(2)
	must(t, web.publish())
	if token, err := os.ReadFile(filepath.Join(web.dir(), "token")); err != nil || string(token) != web.token || web.sees() == "" {
		t.Errorf("the fresh token is not in use: %v", err)
	}
	if err := db.publish(); refusal.Of(err) != refusal.VolumeInvalid {
		t.Errorf("a new volume outside of it: %v", err)
	}
	if err := db.unpublish(); refusal.Of(err) != refusal.VolumeInvalid {
		t.Errorf("the end of a volume outside of it that is nobody's: %v", err)
	}
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 || n.kept() > 0 {
		t.Errorf("left are %v and %d keys", left, n.kept())
	}
}

func TestAVolumeIsOnePodsAlone(t *testing.T) {
	n := newNode(t)
	n.start()
	web, evil := n.pod("web"), n.pod("evil")
	must(t, web.publish())
	before := web.sees()
	evil.volume = web.volume
	if err := evil.publish(); refusal.Of(err) != refusal.VolumeTaken {
		t.Errorf("elsewhere: %v", err)
	}
	must(t, evil.unpublish())
	evil.target = web.target
	if err := evil.publish(); refusal.Of(err) != refusal.VolumeTaken {
		t.Errorf("at the same place: %v", err)
	}
	if token, err := os.ReadFile(filepath.Join(web.dir(), "token")); err != nil || string(token) != web.token {
		t.Errorf("another pod's token lies there: %v", err)
	}
	if web.sees() != before {
		t.Error("the pod is not served as before")
	}
	// A token that is not the pod's own is not used either.
	thief := n.pod("thief")
	thief.token = web.token
	if err := thief.publish(); refusal.Of(err) != refusal.VolumeInvalid || !strings.Contains(err.Error(), "another pod's") {
		t.Errorf("with a stolen token: %v", err)
	}
}

func TestAHundredPodsAtOnce(t *testing.T) {
	n := newNode(t)
	n.start()
	const many = 100
	var pods []*made
	for i := range many {
		pods = append(pods, n.pod("pod-"+string(rune('a'+i/26))+string(rune('a'+i%26))))
	}
	each := func(do func(*made) error) {
		var calls sync.WaitGroup
		for _, p := range pods {
			calls.Go(func() {
				if err := do(p); err != nil {
					t.Errorf("%s: %v", p.name, err)
				}
			})
		}
		calls.Wait()
	}
	each((*made).publish)
	each(func(p *made) error {
		if p.sees() == "" {
			return errors.New("nothing is served")
		}
		return p.publish()
	})
	each((*made).unpublish)
	for _, p := range pods {
		if left := p.left(); len(left) > 0 {
			t.Fatalf("left are %v", left)
		}
	}
	if entries, err := os.ReadDir(n.csi.Dir); err != nil || len(entries) > 0 || n.kept() > 0 || len(n.driver.all()) > 0 {
		t.Errorf("left are %v (error %v), %d keys, %d volumes", entries, err, n.kept(), len(n.driver.all()))
	}
}

// TestABusyVolumeGoes: a process that stands in the pod's directory does not keep the pod from ending.
func TestABusyVolumeGoes(t *testing.T) {
	n := newNode(t)
	n.start()
	web := n.pod("web")
	must(t, web.publish())
	inside, err := os.Open(web.target)
	must(t, err)
	defer inside.Close()
	must(t, web.unpublish())
	if left := web.left(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}

// TestNoTokenIsTold: not in logs, not in errors, whatever happened.
func TestNoTokenIsTold(t *testing.T) {
	n := newNode(t)
	n.csi.Timeout = time.Second
	n.start()
	web := n.pod("web")
	var told strings.Builder
	tell := func(err error) {
		if err != nil {
			told.WriteString(err.Error() + "\n")
		}
	}
	n.refuse(web, refusal.New(refusal.TokenRejected, "the test says so"))
	tell(web.publish())
	n.ca.Refuse(nil)
	for _, passed := range []string{web.token, `{"meshca":` + web.token, `{"meshca":{"token":"` + web.token, `{"meshca":{"token":["` + web.token + `"]}}`, tokens("other", web.token), tokens(Audience, web.token+"\n")} {
		r := web.request()
		r.VolumeContext[keyTokens] = passed
		_, err := csi.NewNodeClient(n.conn).NodePublishVolume(t.Context(), r)
		if err == nil {
			t.Errorf("%.40s is taken for a token", passed)
		}
		tell(err)
	}
	tell(web.publish())
	n.ca.Stop()
	web.freshToken(2)
	tell(web.publish())
	tell(web.unpublish())
	told.WriteString(n.log.String())
	parts := strings.Split(web.token, ".")
	for _, secret := range []string{parts[2][:16], parts[1][:40]} {
		if strings.Contains(told.String(), secret) {
			t.Errorf("a token, or a part of it, is told")
		}
	}
	if told.Len() < 500 {
		t.Error("nothing was told that a token could be in")
	}
}

// pen is a Writer as another package would be: files of what the workload has.
type pen struct {
	hold chan struct{}
	ends chan struct{}
}

func (p *pen) Attributes() []string { return []string{"files"} }

func (p *pen) Check(options map[string]string) error {
	if options["files"] != "pem" {
		return errors.New("files: only pem is written")
	}
	return nil
}

func (p *pen) Keep(ctx context.Context, k *agent.Kept, dir string, _ *int, _ map[string]string, report func(error)) error {
	select {
	case <-p.hold:
	case <-ctx.Done():
		return ctx.Err()
	}
	m, _ := k.Materials()
	if err := os.WriteFile(filepath.Join(dir, "id"), []byte(m.SVID.ID.String()), 0o600); err != nil {
		return err
	}
	report(nil)
	<-ctx.Done()
	p.ends <- struct{}{}
	return ctx.Err()
}

func TestFilesAreThereBeforeThePodStarts(t *testing.T) {
	n := newNode(t)
	writer := &pen{hold: make(chan struct{}), ends: make(chan struct{}, 1)}
	n.csi.Writer, n.csi.Timeout = writer, 2*time.Second
	n.start()
	web := n.pod("web")
	web.attributes["files"] = "jks"
	if err := web.publish(); refusal.Of(err) != refusal.VolumeInvalid || !strings.Contains(err.Error(), "only pem is written") {
		t.Errorf("attributes that the writer refuses: %v", err)
	}
	web.attributes["files"] = "pem"
	if err := web.publish(); refusal.Of(err) != refusal.SVIDPending {
		t.Errorf("without its files: %v", err)
	}
	close(writer.hold)
	must(t, web.publish())
	if id, err := os.ReadFile(filepath.Join(web.target, "id")); err != nil || string(id) != web.id {
		t.Errorf("the file holds %q, error %v", id, err)
	}
	must(t, web.unpublish())
	select {
	case <-writer.ends:
	default:
		t.Error("the writer goes on when the volume has ended")
	}
	if left := web.left(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
}
