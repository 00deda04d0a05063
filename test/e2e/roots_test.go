package e2e

import (
	"context"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/mesh"
	"github.com/meshca/meshca/test/parts"
)

// killCA ends the CA as a power cut would.
func (s *site) killCA() {
	s.t.Helper()
	check(s.t, s.ca.Signal(syscall.SIGKILL))
	<-s.ca.Done()
	s.ca = nil
}

// authorities asks the CA's admin socket.
func (s *site) authorities(ask func(context.Context, meshcav1.AuthorityServiceClient) error) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	conn, err := client.Open(ctx, s.file("admin.sock"))
	if err != nil {
		return err
	}
	defer conn.Close()
	return ask(ctx, conn.Authorities)
}

// rollout is how the rollout stands, nil while the CA cannot say so.
func (s *site) rollout() (r *meshcav1.RolloutStatus, roots int) {
	_ = s.authorities(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		all, err := c.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
		r, roots = all.GetRollout(), len(all.GetRoots())
		return err
	})
	return r, roots
}

// newest is the end of the SVID that an account of the namespace shop got last.
func (s *site) newest(account string) time.Time {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	conn, err := client.Open(ctx, s.file("admin.sock"))
	check(s.t, err)
	defer conn.Close()
	list, err := conn.CA.ListSVIDs(ctx, &meshcav1.ListSVIDsRequest{Namespace: "shop", ServiceAccount: account, Limit: 1})
	check(s.t, err)
	answer, err := list.Recv()
	check(s.t, err)
	return answer.GetEntries()[0].GetNotAfter().AsTime()
}

// Two Envoys under steady traffic, a handshake for every request, while the intermediate is replaced, the root is
// replaced behind a canary by a CA that is killed on the way, and the root is tainted. An agent sleeps through all of it.
// The two hardly use the machine but for their traffic, so they run side by side.
func TestRootsUnderTraffic(t *testing.T) {
	t.Run("disk", func(t *testing.T) {
		t.Parallel()
		rootsUnderTraffic(t, onDisk())
	})
	t.Run("Vault", func(t *testing.T) {
		t.Parallel()
		rootsUnderTraffic(t, inVault(t))
	})
}

func rootsUnderTraffic(t *testing.T, root holder) {
	s := newSiteOf(t, root, "jwks", ttl)
	s.startCA()
	n := s.node("node1")
	n.workload("web")
	n.workload("db")
	n.start()
	sleeper := s.node("node2")
	sleeper.workload("web")
	sleeper.start()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	m, err := mesh.Start(ctx, mesh.Config{
		Envoy: parts.Path(t, "envoy"), Dir: t.TempDir(),
		Client: mesh.Workload{ID: "spiffe://mesh.test/ns/shop/sa/web", Socket: n.socket("web")},
		Server: mesh.Workload{ID: "spiffe://mesh.test/ns/shop/sa/db", Socket: n.socket("db")},
	})
	check(t, err)
	t.Cleanup(m.Stop)
	sleeper.await("web", "fresh", "")
	sleeper.stop()

	traffic := m.NewTraffic()
	running, end := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { traffic.Run(running, rate) })
	defer func() { end(); done.Wait() }()
	noFaults := func(after string) {
		t.Helper()
		if traffic.Failed() > 0 {
			t.Fatalf("after %s: %d of %d requests failed, the last so: %s", after, traffic.Failed(), traffic.OK()+traffic.Failed(), traffic.Fault())
		}
	}
	step := func(want string) {
		t.Helper()
		var last *meshcav1.RolloutStatus
		limit := time.Now().Add(4 * ttl)
		for last, _ = s.rollout(); last.GetStep() != want; last, _ = s.rollout() {
			if time.Now().After(limit) {
				t.Fatalf("the rollout did not come to %s: %v", want, last)
			}
			time.Sleep(100 * time.Millisecond)
		}
		noFaults(want)
	}
	order := func(ask func(context.Context, meshcav1.AuthorityServiceClient) error) {
		t.Helper()
		check(t, s.authorities(ask))
	}

	order(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateIntermediate(ctx, &meshcav1.RotateIntermediateRequest{})
		return err
	})
	order(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: root.next(), Share: 50})
		return err
	})
	step("canary")
	s.killCA()
	s.startCA()
	step("canary")
	time.Sleep(ttl)
	order(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.ContinueRollout(ctx, &meshcav1.ContinueRolloutRequest{})
		return err
	})
	step("retired")
	s.killCA()
	// From now on SVIDs live so long that what comes does not find them renewed by their age.
	config, err := os.ReadFile(s.file("ca.yaml"))
	check(t, err)
	s.write("ca.yaml", strings.Replace(string(config), "svid: {ttl: 20s}", "svid: {ttl: 30m}", 1))
	s.startCA()
	step("out")
	first, roots := s.rollout()
	if roots != 1 || first.GetAborted() {
		t.Errorf("%d roots are trusted: %v", roots, first)
	}

	for _, account := range []string{"web", "db"} {
		if left := time.Until(s.newest(account)); left < 10*time.Minute {
			t.Errorf("the SVID of %s ends in %s, and was to live for half an hour", account, left)
		}
	}

	// The new root's key is stolen: it goes within 40 seconds, whatever lives under it. What is renewed is renewed for that.
	successor := root.next()
	tainted := time.Now()
	order(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: successor, TaintedWithin: durationpb.New(2 * ttl)})
		return err
	})
	step("out")
	if took := time.Since(tainted); took > 2*ttl+5*time.Second {
		t.Errorf("the tainted root was out after %s", took)
	}
	second, roots := s.rollout()
	if roots != 1 || second.GetOldRoot() != first.GetNewRoot() {
		t.Errorf("%d roots are trusted: %v", roots, second)
	}
	time.Sleep(ttl)
	noFaults("everything")

	// Who slept through it finds its way back by the bundle file.
	if _, err := os.Stat(s.file("bundle.json")); err != nil {
		t.Fatal(err)
	}
	sleeper.start()
	sleeper.await("web", "fresh", "")
	end()
	done.Wait()
	noFaults("the end")
	t.Logf("%d requests, %d failed", traffic.OK(), traffic.Failed())
}
