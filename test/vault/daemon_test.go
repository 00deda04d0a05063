package vault_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/parts"
	"github.com/meshca/meshca/test/vault"
)

// daemon is the real CA on a world's Vault, with intermediates of forty seconds.
type daemon struct {
	w       *world
	ops     string
	dir     string
	binary  string
	process *parts.Process
}

const intermediateLife = 40 * time.Second

// serve starts the CA; it ends with the test.
func (w *world) serve(extra string) *daemon {
	w.t.Helper()
	dir := w.t.TempDir()
	tokens, err := localissuer.Open(dir, "https://one.test")
	must(w.t, err)
	keys, err := tokens.JWKS()
	must(w.t, err)
	must(w.t, os.WriteFile(filepath.Join(dir, "jwks.json"), keys, 0o600))
	binary := filepath.Join(dir, "meshca")
	parts.SeeSource()
	build := exec.CommandContext(w.t.Context(), "go", "build", "-o", binary, "github.com/meshca/meshca/cmd/meshca")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		w.t.Fatalf("go build: %v\n%s", err, out)
	}
	d := &daemon{w: w, dir: dir, binary: binary, ops: freeAddress(w.t)}
	must(w.t, os.WriteFile(filepath.Join(dir, "ca.yaml"), fmt.Appendf(nil, `
trustDomain: mesh.example
listen: %s
opsAddress: %s
adminSocket: %[3]s/admin.sock
stateDir: %[3]s/state
bundleFile: %[3]s/bundle.json
audit: {file: %[3]s/audit.log}
svid: {ttl: 10s}
intermediate: {ttl: %[4]s}
clusters:
  - {name: one, mode: jwks, issuer: "https://one.test", liveness: none, jwks: {file: %[3]s/jwks.json}}
upstream:
  vault:
    address: %[5]s
    mount: %[6]s
    issuer: root-1
    auth: {appRole: {path: %[7]s, roleIDFile: %[8]s/role-id, secretIDFile: %[8]s/secret-id}}
    timeout: 2s
    poll: 5s
%[9]s
`, freeAddress(w.t), d.ops, dir, intermediateLife, w.Address, w.mount, w.approle, w.dir, extra), 0o600))
	d.start()
	w.t.Cleanup(func() {
		d.process.Stop(15 * time.Second)
		if w.t.Failed() {
			w.t.Logf("the CA printed last:\n%s", d.process.Output())
		}
	})
	return d
}

// start starts the process.
func (d *daemon) start() {
	d.w.t.Helper()
	var err error
	d.process, err = parts.Start(parts.Command{Path: d.binary, Args: []string{"serve", "--config", filepath.Join(d.dir, "ca.yaml")}})
	must(d.w.t, err)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return l.Addr().String()
}

// get asks the ops listener.
func (d *daemon) get(path string) (int, string, error) {
	ctx, cancel := context.WithTimeout(d.w.t.Context(), 5*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.ops+path, nil)
	if err != nil {
		return 0, "", err
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(body), err
}

// says wants this code and this text of /readyz.
func (d *daemon) says(code int, text string) func() error {
	return func() error {
		got, body, err := d.get("/readyz")
		if err == nil && (got != code || !strings.Contains(body, text)) {
			err = fmt.Errorf("/readyz says %d %q, want %d and %q", got, body, code, text)
		}
		return err
	}
}

// metric reads a gauge.
func (d *daemon) metric(name string) float64 {
	d.w.t.Helper()
	_, body, err := d.get("/metrics")
	must(d.w.t, err)
	found := regexp.MustCompile(`(?m)^` + name + `(?:\{.*\})? (\S+)$`).FindStringSubmatch(body)
	if found == nil {
		d.w.t.Fatalf("there is no metric %s", name)
	}
	v, err := strconv.ParseFloat(found[1], 64)
	must(d.w.t, err)
	return v
}

// roots are those of the bundle file.
func (d *daemon) roots() int {
	data, err := os.ReadFile(filepath.Join(d.dir, "bundle.json"))
	if err != nil {
		return 0
	}
	var bundle struct {
		Keys []any `json:"keys"`
	}
	must(d.w.t, json.Unmarshal(data, &bundle))
	return len(bundle.Keys)
}

// TestVaultAwayForLongerThanHalfALife: the CA issues (its own SVID is renewed every few seconds), and says for how long it
// can; at the end of that it is not ready, for that reason, and it comes back with Vault.
func TestVaultAwayForLongerThanHalfALife(t *testing.T) {
	server := vault.Raft(t)
	w := newWorld(t, server)
	d := w.serve("")
	eventually(t, 30*time.Second, d.says(http.StatusOK, "ok\n"))
	server.Kill()
	killed := time.Now()
	until := time.Unix(int64(d.metric("meshca_issuance_until_seconds")), 0)
	eventually(t, intermediateLife, d.says(http.StatusOK, "issuance goes on until "+until.UTC().Format(time.RFC3339)))
	if up, since := d.metric("meshca_upstream_up"), d.metric("meshca_upstream_failing_since_seconds"); up != 0 || since < float64(killed.Unix()) {
		t.Errorf("meshca_upstream_up %v, failing since %v", up, since)
	}
	if end := time.Unix(int64(d.metric("meshca_intermediate_not_after_seconds")), 0); !end.After(until) {
		t.Errorf("the intermediate ends at %s, and issuance goes on until %s", end, until)
	}
	// Half of its life is over, and it is ready for as long as it said.
	time.Sleep(time.Until(until.Add(-intermediateLife / 4)))
	must(t, d.says(http.StatusOK, "degraded: ")())
	if ready := d.metric("meshca_ready"); ready != 1 {
		t.Errorf("meshca_ready %v", ready)
	}
	time.Sleep(time.Until(until.Add(2 * time.Second)))
	eventually(t, 10*time.Second, d.says(http.StatusServiceUnavailable, "ISSUER_ENDING"))

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must(t, server.StartAgain(ctx))
	must(t, server.Unseal(ctx))
	eventually(t, time.Minute, func() error {
		if _, body, _ := d.get("/readyz"); body != "ok\n" {
			return fmt.Errorf("/readyz says %q", body)
		}
		return nil
	})
	if up := d.metric("meshca_upstream_up"); up != 1 {
		t.Errorf("meshca_upstream_up %v", up)
	}
}

// TestRootsThatAppear: with autoTrust a second root of the mount comes into the bundle, with an audit line, and signs for
// nobody; without it it is only listed.
func TestRootsThatAppear(t *testing.T) {
	w := newWorld(t, shared)
	caFile := "    caFile: " + w.CAFile + "\n"
	auto, plain := w.serve(caFile+"    autoTrust: true"), w.serve(caFile)
	for _, d := range []*daemon{auto, plain} {
		eventually(t, 30*time.Second, d.says(http.StatusOK, "ok\n"))
	}
	w.write(w.mount+"/root/generate/internal", map[string]any{"common_name": "another root", "issuer_name": "root-2", "exclude_cn_from_sans": true,
		"key_type": "ec", "key_bits": 256, "ttl": "87600h", "max_path_length": 1})
	eventually(t, 30*time.Second, func() error {
		if n := auto.roots(); n != 2 {
			return fmt.Errorf("%d roots are trusted", n)
		}
		return nil
	})
	audit, err := os.ReadFile(filepath.Join(auto.dir, "audit.log"))
	must(t, err)
	if !strings.Contains(string(audit), `"verb":"ca trust found root"`) || !strings.Contains(string(audit), "another root") {
		t.Errorf("the audit log:\n%s", audit)
	}
	_, metrics, err := auto.get("/metrics")
	must(t, err)
	if n := strings.Count(metrics, "\nmeshca_intermediate_not_after_seconds{"); n != 1 {
		t.Errorf("there are %d intermediates: a root that was found signs", n)
	}
	if n := plain.roots(); n != 1 {
		t.Errorf("without autoTrust %d roots are trusted", n)
	}
}

// TestTheReplacedIssuerIsDeleted: the mount loses the issuer that the configuration names, once another one signs. The CA
// starts, signs, says what to change, and can go on to a third one.
func TestTheReplacedIssuerIsDeleted(t *testing.T) {
	w := newWorld(t, shared)
	d := w.serve("    caFile: " + w.CAFile + "\n")
	eventually(t, 30*time.Second, d.says(http.StatusOK, "ok\n"))
	makes := func(name string) {
		w.write(w.mount+"/root/generate/internal", map[string]any{"common_name": name, "issuer_name": name, "exclude_cn_from_sans": true,
			"key_type": "ec", "key_bits": 256, "ttl": "87600h", "max_path_length": 1})
	}
	goes := func(name string) {
		t.Helper()
		conn, err := client.Open(t.Context(), filepath.Join(d.dir, "admin.sock"))
		must(t, err)
		defer conn.Close()
		_, err = conn.Authorities.RotateRoot(t.Context(), &meshcav1.RotateRootRequest{Issuer: name})
		must(t, err)
		eventually(t, time.Minute, func() error {
			a, err := conn.Authorities.GetAuthorities(t.Context(), &meshcav1.GetAuthoritiesRequest{})
			if err == nil && a.GetRollout().GetStep() != string(rotation.StepOut) {
				err = fmt.Errorf("the rollout is %v", a.GetRollout())
			}
			return err
		})
	}
	makes("root-2")
	goes("root-2")
	_, err := w.Client.Logical().DeleteWithContext(t.Context(), w.mount+"/issuer/root-1")
	must(t, err)
	d.process.Stop(15 * time.Second)
	d.start()
	eventually(t, 30*time.Second, d.says(http.StatusOK, "ok\n"))
	if out := d.process.Output(); !strings.Contains(out, "the issuer that the configuration names cannot be used") || !strings.Contains(out, "Set upstream.vault.issuer") {
		t.Error("it does not say what to change")
	}
	makes("root-3")
	goes("root-3")
}
