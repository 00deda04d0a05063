package agent

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/test/fakeca"
)

func contains(s, part string) bool { return strings.Contains(s, part) }

func stateOf(denied ...string) fakeca.State { return fakeca.State{Denied: denied} }

func (r *running) findings() []*meshcav1.Finding {
	r.n.t.Helper()
	c, done := r.admin()
	defer done()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	answer, err := c.CheckAgent(ctx, &meshcav1.CheckAgentRequest{}, grpc.WaitForReady(true))
	must(r.n.t, err)
	return answer.GetFindings()
}

// find returns the worst finding about the subject whose detail holds the text.
func find(list []*meshcav1.Finding, subject, text string) *meshcav1.Finding {
	var worst *meshcav1.Finding
	for _, f := range list {
		if strings.HasPrefix(f.GetSubject(), subject) && contains(f.GetDetail(), text) && (worst == nil || f.GetLevel() > worst.GetLevel()) {
			worst = f
		}
	}
	return worst
}

// jwt is a token that says of itself when it ends.
func jwt(end time.Time) string {
	payload := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, end.Unix()))
	return "e30." + payload + ".c2ln"
}

func TestCheckOfASoundAgent(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.asJWTs(time.Now().Add(time.Hour))
	a := n.start()
	eventually(t, "nothing is found", func() bool {
		for _, f := range a.findings() {
			if f.GetLevel() != meshcav1.Finding_LEVEL_OK {
				t.Logf("%v", f)
				return false
			}
		}
		return true
	})
}

// asJWTs makes the tokens look like tokens.
func (n *node) asJWTs(end time.Time) {
	token := jwt(end)
	n.write("agent.token", token+".")
	n.write("agent.token", token)
	n.ca.Agent(token, "node-1")
	for i, w := range n.config.Workloads {
		t := jwt(end.Add(time.Duration(i+1) * time.Second))
		must(n.t, os.WriteFile(w.TokenFile, []byte(t), 0o600))
		n.ca.Workload(t, fmt.Sprintf("/ns/test/sa/jwt-%d", i))
	}
}

func TestCheckFindsWhatIsWrong(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.workload("gone")
	n.asJWTs(time.Now().Add(-time.Hour))
	must(t, os.Remove(n.path("gone.token")))
	must(t, os.Chmod(n.path("bundle.json"), 0o666))
	must(t, os.Chmod(n.path("web.token"), 0o644))
	n.ca.Skew(5 * time.Minute)
	a := n.start()
	eventually(t, "served", func() bool { return a.state(0) == "fresh" && a.state(1) == "broken" })
	must(t, os.Chmod(n.config.RuntimeDir, 0o777))
	must(t, os.Chmod(n.path("run/keys"), 0o755))
	must(t, os.Chmod(n.path("web.sock"), 0o666))
	n.ca.Stop()
	list := a.findings()
	for _, want := range []struct {
		subject, text string
		level         meshcav1.Finding_Level
	}{
		{"CA", "CA_UNREACHABLE", meshcav1.Finding_LEVEL_ERROR},
		{"clock", "the CA's clock minus", meshcav1.Finding_LEVEL_ERROR},
		{"trust bundle", "decides which CA is trusted", meshcav1.Finding_LEVEL_ERROR},
		{"the agent's token", "ended", meshcav1.Finding_LEVEL_ERROR},
		{"directories", n.config.RuntimeDir + " has mode", meshcav1.Finding_LEVEL_ERROR},
		{"directories", "keys has mode", meshcav1.Finding_LEVEL_ERROR},
		{"workload " + n.path("web.sock"), "the socket has mode", meshcav1.Finding_LEVEL_WARNING},
		{"workload " + n.path("web.sock"), "everyone on this node can read", meshcav1.Finding_LEVEL_WARNING},
		{"workload " + n.path("gone.sock"), "TOKEN_UNREADABLE", meshcav1.Finding_LEVEL_ERROR},
		{"workloads", "1 of 2", meshcav1.Finding_LEVEL_OK},
	} {
		f := find(list, want.subject, want.text)
		if want.subject == "workloads" {
			f = find(list, want.subject, "of 2")
		}
		if f == nil || f.GetLevel() != want.level {
			t.Errorf("%s, %q: %v", want.subject, want.text, f)
		} else if f.GetLevel() != meshcav1.Finding_LEVEL_OK && f.GetHint() == "" {
			t.Errorf("%s: no hint", want.subject)
		}
	}
	if t.Failed() {
		for _, f := range list {
			t.Log(f)
		}
	}
}

func TestOps(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	n.config.OpsAddress = freeAddress(t)
	n.ca.Stop()
	a := n.start()
	get := func(path string) (int, string) {
		r, err := http.Get("http://" + n.config.OpsAddress + path)
		if err != nil {
			return 0, ""
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(body)
	}
	eventually(t, "it says why it is not ready", func() bool {
		code, body := get("/readyz")
		return code == http.StatusServiceUnavailable && contains(body, "CA_UNREACHABLE")
	})
	if code, _ := get("/livez"); code != http.StatusOK {
		t.Errorf("/livez says %d", code)
	}
	_, err := n.ca.Start()
	must(t, err)
	eventually(t, "ready", func() bool { code, _ := get("/readyz"); return code == http.StatusOK && a.state(0) == "fresh" })
	var metrics string
	eventually(t, "the first renewal is counted", func() bool {
		_, metrics = get("/metrics")
		return contains(metrics, `renewals_total{credential="workload",outcome="ok"}`)
	})
	for _, want := range []string{
		`meshca_agent_workloads{state="fresh"} 1`, `meshca_agent_renewals_total{credential="self",outcome="CA_UNREACHABLE"}`,
		`meshca_agent_renewals_total{credential="workload",outcome="ok"} 1`, "meshca_agent_bundle_sequence 1", "meshca_agent_ready 1",
		`meshca_agent_info{version="v0-test"} 1`, "meshca_agent_svid_remaining_seconds_min", "meshca_agent_clock_skew_seconds",
	} {
		if !contains(metrics, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestAdminSocketIsPrivateAndShowsNoKeyOrToken(t *testing.T) {
	n := newNode(t)
	n.workload("web")
	a := n.start()
	eventually(t, "fresh", func() bool { return a.state(0) == "fresh" })
	info, err := os.Lstat(n.path("run/admin.sock"))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	all := fmt.Sprint(a.status(), a.findings(), n.log.String())
	for _, secret := range []string{"agent-token", "web-token", "PRIVATE KEY"} {
		if contains(all, secret) {
			t.Errorf("%q is shown", secret)
		}
	}
	c, done := a.admin()
	defer done()
	b, err := c.GetAgentBundle(t.Context(), &meshcav1.GetAgentBundleRequest{})
	must(t, err)
	if string(b.GetBundle()) == "" {
		t.Error("no bundle")
	}
}
