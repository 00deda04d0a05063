package agent

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/fakeca"
)

// anew ends the CA and starts one in its place that was made anew. The bundle file stays.
func (n *node) anew() {
	n.t.Helper()
	n.ca.Stop()
	ca, err := n.ca.Anew()
	must(n.t, err)
	_, err = ca.Start()
	must(n.t, err)
	n.ca = ca
	n.t.Cleanup(func() {
		ca.Stop()
		for _, v := range ca.Seen().Violations {
			n.t.Errorf("the agent broke the contract: %s", v)
		}
	})
}

// A CA that was made anew is followed once its bundle is in the file, by an agent that goes on and by one that starts: the agent
// attests itself again, and what workloads hold under the root that is gone is renewed at once.
func TestAnAgentFollowsACAThatWasMadeAnew(t *testing.T) {
	for name, restart := range map[string]bool{"while it runs": false, "over a restart": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.workload("web")
			a := n.start()
			eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
			before := a.status1().GetSvid().GetSerial()
			if restart {
				must(t, a.stop())
			}
			n.anew()
			if restart {
				a = n.start()
			}
			eventually(t, "the CA is not trusted", func() bool {
				for _, f := range a.findings() {
					if f.GetSubject() == "CA" && strings.Contains(f.GetDetail(), string(refusal.CAUntrusted)) {
						return true
					}
				}
				return false
			})
			if now := a.status1(); now.GetSvid().GetSerial() != before {
				t.Errorf("before the file says so it follows: %v", now)
			}
			n.write("bundle.json", string(n.ca.Bundle()))
			eventually(t, "it follows", func() bool {
				return a.status().GetConnected() && a.state(0) == "fresh" && a.status1().GetSvid().GetSerial() != before
			})
			w, roots := a.roster.list()[0], x509bundle.FromX509Authorities(n.ca.Domain(), n.ca.Roots())
			if err := w.holds().verify(roots, w.now()); err != nil || a.self.identity.Value().verify(roots, w.now()) != nil {
				t.Errorf("an SVID is of the CA before: %v", err)
			}
			if fetch(t, n.path("web.sock"), "default")["default"] == nil {
				t.Error("nothing is served")
			}
		})
	}
}

// A file that is not newer is not taken, whatever roots it has: it may be an old one. Where nothing answers that is trusted, a
// check says so, and what leads out.
func TestAFileThatIsNotNewerIsTold(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	old := n.ca.Bundle()
	must(t, n.ca.ReplaceRoot())
	n.write("bundle.json", string(n.ca.Bundle()))
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" && a.status().GetConnected() })
	told := func() *meshcav1.Finding {
		for _, f := range a.findings() {
			if f.GetSubject() == "trust bundle" {
				return f
			}
		}
		return nil
	}
	n.write("bundle.json", string(old))
	must(t, a.trust.readFile())
	if f := told(); f.GetLevel() != meshcav1.Finding_LEVEL_OK {
		t.Errorf("an old file, which is nobody's fault: %v", f)
	}
	n.ca.Stop()
	other, err := fakeca.New("mesh.test")
	must(t, err)
	must(t, other.StartAt(n.config.Server))
	t.Cleanup(other.Stop)
	n.write("bundle.json", string(other.Bundle()))
	eventually(t, "it is told", func() bool {
		f := told()
		return f.GetLevel() == meshcav1.Finding_LEVEL_ERROR && strings.Contains(f.GetDetail(), "its sequence is 1, and 2 is held") &&
			strings.Contains(f.GetHint(), "certctl ca accept-rollback --above 2")
	})
	if a.trust.sequence() != 2 || a.status().GetConnected() {
		t.Error("an older file was taken")
	}
}
