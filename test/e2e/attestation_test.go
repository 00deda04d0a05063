package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The whole way in both modes: what the API server says of pods, nodes and accounts decides who gets what, and certctl
// tells why not.
func TestAttestation(t *testing.T) {
	for _, mode := range []string{"tokenReview", "jwks"} {
		t.Run(mode, func(t *testing.T) { attest(t, mode) })
	}
}

func attest(t *testing.T, mode string) {
	s := newSite(t, mode, 30*time.Second)
	s.startCA()
	one, two := s.node("node1"), s.node("node2")
	web := one.workload("web")
	db := two.workload("db") // runs on node2 ...
	one.serve("stolen", read(t, filepath.Join(two.dir, "tokens", "db")))
	one.serve("swapped", read(t, filepath.Join(one.dir, "token"))) // the agent's own token, as if it were a workload's
	one.start()
	two.start()

	one.await("web", "fresh", "")
	two.await("db", "fresh", "")
	// ... and its token is worth nothing to node1's agent.
	one.await("stolen", "refused", "POD_NOT_ON_NODE")
	if mode == "jwks" {
		one.await("swapped", "refused", "TOKEN_AUDIENCE")
	} else {
		one.await("swapped", "refused", "")
	}
	if out, code := s.certctl("--socket", s.file("admin.sock"), "explain", "pod", "shop/"+db.Name, "-o", "json"); code != 0 ||
		!strings.Contains(out, "POD_NOT_ON_NODE") || !strings.Contains(out, "spiffe://mesh.test/meshca/agent/one/node1") {
		t.Errorf("explain (exit %d) does not tell who showed the stolen token:\n%s", code, out)
	}

	// A denial takes effect within seconds, and its end too; nothing of another identity is touched.
	const id = "spiffe://mesh.test/ns/shop/sa/web"
	if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "deny", id, "--why", "a test"); code != 0 {
		t.Fatalf("svid deny: exit %d\n%s", code, out)
	}
	began := time.Now()
	one.await("web", "denied", "")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the agent dropped the denied identity after %s", took)
	}
	two.await("db", "fresh", "")
	if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "allow", id); code != 0 {
		t.Fatalf("svid allow: exit %d\n%s", code, out)
	}
	one.await("web", "fresh", "")

	// The API server goes away and comes back: nobody restarts anything.
	s.kube.Stop()
	if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "renew", "--all"); code != 0 {
		t.Fatalf("svid renew: exit %d\n%s", code, out)
	}
	if mode == "tokenReview" {
		one.await("web", "stale", "KUBERNETES_UNAVAILABLE")
	} else {
		one.await("web", "fresh", "") // verified here, under keys that are known
	}
	check(t, s.kube.StartAgain(t.Context()))
	one.await("web", "fresh", "")

	// The pod goes, and with it its identity: at the next renewal, which is ordered here.
	check(t, s.kube.DeletePod(t.Context(), web, 0))
	time.Sleep(time.Second) // the watch's word; a renewal that beats it is the last one
	if out, code := s.certctl("--socket", s.file("admin.sock"), "svid", "renew", id); code != 0 {
		t.Fatalf("svid renew: exit %d\n%s", code, out)
	}
	one.await("web", "refused", "POD_GONE") // and nothing of it is served any more
	two.await("db", "fresh", "")

	if out, code := s.certctl("--socket", s.file("admin.sock"), "check"); code != 0 {
		t.Errorf("certctl check: exit %d\n%s", code, out)
	}
}

// await waits until the agent says that the workload is in this state, and was last refused for this reason if one is
// given.
func (n *agentNode) await(workload, state, reason string) {
	n.site.t.Helper()
	var last string
	for end := time.Now().Add(45 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		out, code := n.site.certctl("--agent="+filepath.Join(n.dir, "run", "admin.sock"), "status", "-o", "json")
		if code != 0 {
			last = out
			continue
		}
		var status struct {
			Agent struct {
				Workloads []struct {
					Socket, State string
					LastRefusal   struct{ Reason string }
				}
			}
		}
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			n.site.t.Fatalf("certctl status: %v\n%s", err, out)
		}
		for _, w := range status.Agent.Workloads {
			if w.Socket != n.socket(workload) {
				continue
			}
			if w.State == state && (reason == "" || w.LastRefusal.Reason == reason) {
				return
			}
			last = w.State + " " + w.LastRefusal.Reason
		}
	}
	n.site.t.Fatalf("%s on %s is %s; want it %s %s", workload, n.name, last, state, reason)
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	check(t, err)
	return string(data)
}
