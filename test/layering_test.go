package test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

const module = "github.com/meshca/meshca"

// rule says which packages of ours the packages that match at may import, tests aside. The first rule that matches a
// package holds; paths are relative to the module.
type rule struct {
	at  string // a path.Match pattern; ending in /... it covers everything below too
	may []string
	why string
}

var layers = []rule{
	{"api/refusal", nil,
		"every package may import it, so it can import none"},
	{"api/serial", nil,
		"everybody spells serials alike"},
	{"api/meshca/v1", nil,
		"the wire format stands alone: clients in other repositories import it"},
	{"rotation", []string{"api/refusal"},
		"schedules and the loop know nothing of certificates, so that Vault's login can be kept by them too"},
	{"attestor", []string{"rotation", "api/refusal"},
		"what attested means does not depend on what is issued for it"},
	{"attestor/...", []string{"attestor", "rotation", "api/refusal"},
		"an attestor answers whether something is true, never what it may have"},
	{"ca/registration", []string{"attestor", "ca", "ca/policy", "rotation", "api/refusal", "api/serial"},
		"the one place where attestation, policy and issuance meet"},
	{"ca/policy", []string{"api/refusal"},
		"policy is a pure function of names: it can be tested, fuzzed and explained without a CA"},
	{"ca", []string{"rotation", "api/refusal", "api/serial"},
		"the core signs what it is granted; who asks, where things are stored and who signs for it are handed in"},
	{"ca/store/storetest", []string{"ca", "rotation", "api/refusal"},
		"the suite holds every store to the same contract, so it knows none of them"},
	{"ca/keyfile", nil,
		"files that hold secrets are read and written in one place"},
	{"ca/pkcs11", []string{"ca", "ca/keyfile"},
		"tokens are spoken to in one place, whoever's keys are in them"},
	{"ca/...", []string{"ca", "ca/keyfile", "ca/pkcs11", "rotation", "api/refusal", "api/serial"},
		"an implementation knows the contract it fulfils, not its neighbours; keys lie in files and tokens for all of them"},
	{"api/inbound", nil,
		"every door bounds what comes in, so it knows none"},
	{"api/sds", []string{"api/inbound", "rotation", "api/refusal"},
		"the engine knows nothing of agents, so that the CA can open the same door"},
	{"api/workload", []string{"rotation", "api/refusal"},
		"as api/sds"},
	{"api/*/client", []string{"api/meshca/v1", "rotation", "api/refusal"},
		"agents and certctl link clients; a client that knew the CA would bring it along"},
	{"api/*", []string{"api/inbound", "api/meshca/v1", "ca/registration", "ca/rollout", "ca", "ca/policy", "attestor", "rotation", "api/refusal", "api/serial"},
		"a door translates and calls registration; past it to a store or an upstream there is no way"},
	{"agent", []string{"api/inbound", "api/meshca/v1", "api/issuance/client", "api/sds", "api/workload", "rotation", "api/refusal", "api/serial"},
		"the agent holds no power of its own, so it holds none of the CA's code either"},
	{"agent/selinux", nil, "it labels, and knows nothing of whose the directory is"},
	{"agent/*", []string{"agent", "agent/selinux", "rotation", "api/refusal"},
		"where workloads come from is told to the agent, which does not ask who tells it"},
	{"cmd/internal/strictyaml", nil,
		"how a configuration file is read has nothing to do with what stands in it"},
	{"cmd/internal/incluster", nil,
		"a call to the API server of the pod's cluster has nothing to do with who makes it"},
	{"cmd/certctl/...", []string{"cmd/certctl/...", "api/meshca/v1", "api/admin/client", "ca/policy", "api/refusal", "api/serial"},
		"certctl runs on any laptop and speaks to admin sockets: it has no other way in; reading a policy needs none"},
	{"cmd/meshca-agent/...", []string{"cmd/meshca-agent/...", "cmd/internal/...", "agent", "agent/*", "api/...", "attestor/unixpeer", "rotation"},
		"composition of the agent: nothing of the CA, and of attestors the one that looks at the node's own processes"},
	{"cmd/meshca/...", []string{"cmd/meshca/...", "cmd/internal/...", "agent", "agent/*", "api/...", "attestor/...", "attestor", "ca", "ca/...", "rotation"},
		"composition of the CA, and of both in one process for `meshca dev`"},
	{"test/...", []string{"..."},
		"tests name whatever they test"},
	{"test", []string{"..."},
		"tests name whatever they test"},
}

// links says what a package must not link, directly or through others.
var links = []struct {
	at   string
	bans []string
	why  string
}{
	{"agent", []string{module + "/ca", module + "/attestor"},
		"a stolen agent must have no code that signs or decides"},
	{"cmd/meshca-agent", []string{module + "/ca", module + "/attestor/kubernetes", "go.etcd.io/bbolt", "github.com/smallstep/certificates", "k8s.io/client-go"},
		"it runs on every node: what it links is attack surface and memory, a thousand times"},
	{"cmd/certctl", []string{module + "/ca/registration", module + "/ca/store", module + "/ca/upstream", module + "/agent", module + "/attestor", "go.etcd.io/bbolt", "github.com/smallstep/certificates", "k8s.io/client-go"},
		"it is cross-compiled for laptops, and changes nothing but through an admin socket's audit line"},
	{"rotation", []string{"crypto/x509", "crypto/tls", "net/http"},
		"it decides when, not what: a clock and a hash are all it needs"},
	{"ca/policy", []string{"crypto/x509", "net/http"},
		"a decision about names needs neither certificates nor the network"},
	{"api/sds", []string{"k8s.io/client-go", "go.etcd.io/bbolt", "github.com/smallstep/certificates"},
		"the agent links it"},
	{"cmd/...", []string{"github.com/miekg/pkcs11", "github.com/aws", "github.com/Azure", "cloud.google.com"},
		"this test sees the static build: it loads no shared library, and the signers of clouds are not among those that it offers"},
	{"cmd/...", []string{"testing", "testing/synctest", module + "/test", module + "/ca/store/storetest", "github.com/Shopify/toxiproxy", "github.com/rogpeppe/go-internal/testscript", "pgregory.net/rapid"},
		"what is shipped holds no test code"},
}

// importers says which packages alone may import a library, tests aside.
var importers = []struct {
	library string
	at      []string
	why     string
}{
	{"go.etcd.io/bbolt", []string{"ca/store/bolt"}, "one store, one place that knows its transactions"},
	{"github.com/smallstep/certificates", []string{"ca", "ca/upstream/*"}, "the signer stands behind our guard, nowhere else"},
	{"github.com/hashicorp/vault", []string{"ca/upstream/vault", "test/..."}, "Vault is spoken to in one place"},
	{"go.step.sm/crypto/kms", []string{"ca/pkcs11"}, "tokens are spoken to in one place"},
	{"k8s.io/client-go", []string{"attestor/kubernetes", "api/kubesigner", "test/..."}, "the cluster is asked by its attestor, and answered by its signer, over the attestor's connection"},
	{module + "/attestor/kubernetes/localissuer", []string{"cmd/meshca", "test/..."}, "it makes tokens: `meshca dev` and tests stand in for a cluster with it, nothing else may"},
	{"github.com/spf13/cobra", []string{"cmd/..."}, "only cmd reads flags"},
	{"github.com/fsnotify/fsnotify", []string{"cmd/...", "agent", "agent/*"}, "the core is told of changes, it does not watch files"},
	{"github.com/envoyproxy/go-control-plane", []string{"api/sds", "api/istio", "agent", "cmd/...", "test/..."}, "Envoy's types end where the SDS door ends"},
	{"github.com/container-storage-interface/spec", []string{"agent/csi", "test/..."}, "kubelets ask for volumes at one place"},
	{"k8s.io/kubelet", []string{"agent/csi", "test/..."}, "as the CSI spec"},
	{"cel.dev/cel-go", []string{"ca/policy"}, "a condition is compiled and bounded in one place"},
	{"github.com/zmap/zlint", []string{"ca/lint", "test/..."}, "the lints are one package, each with its citation"},
}

func TestLayers(t *testing.T) {
	for _, p := range packages(t) {
		r, ok := ruleFor(p.rel)
		if !ok {
			t.Errorf("%s has no place in the layers: say in this test what it may import, and why", p.rel)
			continue
		}
		for _, imp := range p.Imports {
			rel, ours := strings.CutPrefix(imp, module+"/")
			if ours && !matchesAny(r.may, rel) {
				t.Errorf("%s imports %s: %s (it may import %s)", p.rel, rel, r.why, strings.Join(r.may, ", "))
			}
		}
	}
}

func TestLinks(t *testing.T) {
	for _, p := range packages(t) {
		for _, l := range links {
			if !matches(l.at, p.rel) {
				continue
			}
			for _, dep := range p.Deps {
				if i := slices.IndexFunc(l.bans, func(ban string) bool { return within(ban, dep) }); i >= 0 {
					t.Errorf("%s links %s: %s", p.rel, dep, l.why)
				}
			}
		}
	}
}

func TestImporters(t *testing.T) {
	for _, p := range packages(t) {
		for _, i := range importers {
			uses := slices.ContainsFunc(p.Imports, func(imp string) bool { return within(i.library, imp) })
			if uses && !matchesAny(i.at, p.rel) {
				t.Errorf("%s imports %s: %s (only %s may)", p.rel, i.library, i.why, strings.Join(i.at, ", "))
			}
		}
	}
}

// TestPackageNames keeps out the names that lead nobody to what is inside.
func TestPackageNames(t *testing.T) {
	empty := []string{"base", "common", "core", "helper", "helpers", "internal", "lib", "manager", "misc", "shared", "tools", "types", "util", "utils"}
	for _, p := range packages(t) {
		if slices.Contains(empty, path.Base(p.rel)) || slices.Contains(empty, p.Name) {
			t.Errorf("%s (package %s): name it after the thing that it holds", p.rel, p.Name)
		}
		if p.Doc == "" && len(p.GoFiles) > 0 && p.Name != "main" && p.rel != "test" && p.rel != "api/meshca/v1" {
			t.Errorf("%s has no package comment: its importers read that first", p.rel)
		}
	}
}

// TestTheRulesBite proves that the matching which the tests above rest on can fail.
func TestTheRulesBite(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"ca", "rotation", true},
		{"ca", "ca/policy", false},
		{"ca", "ca/store/bolt", false},
		{"ca/store/bolt", "ca", true},
		{"ca/store/bolt", "ca/upstream/disk", false},
		{"ca/upstream/disk", "ca/registration", false},
		{"ca/upstream/disk", "ca/pkcs11", true},
		{"ca/pkcs11", "ca/keyring", false},
		{"ca/registration", "ca/policy", true},
		{"ca/registration", "ca/store/bolt", false},
		{"api/issuance", "ca/registration", true},
		{"api/issuance", "ca/store/bolt", false},
		{"api/issuance/client", "ca", false},
		{"api/sds", "agent", false},
		{"agent", "ca", false},
		{"agent", "api/issuance", false},
		{"cmd/certctl", "agent", false},
		{"cmd/meshca-agent", "ca", false},
		{"cmd/meshca", "ca/store/bolt", true},
		{"cmd/meshca", "test/envoy", false},
		{"rotation", "ca", false},
		{"attestor/kubernetes", "ca", false},
	} {
		r, ok := ruleFor(c.from)
		if !ok {
			t.Fatalf("no rule for %s", c.from)
		}
		if got := matchesAny(r.may, c.to); got != c.want {
			t.Errorf("%s may import %s: got %v, want %v", c.from, c.to, got, c.want)
		}
	}
	if _, ok := ruleFor("somewhere/new"); ok {
		t.Error("a package that the table does not name has a rule")
	}
	if within("go.etcd.io/bbolt", "go.etcd.io/bboltx") || !within("go.etcd.io/bbolt", "go.etcd.io/bbolt/errors") {
		t.Error("within does not keep to path elements")
	}
}

func ruleFor(rel string) (rule, bool) {
	i := slices.IndexFunc(layers, func(r rule) bool { return matches(r.at, rel) })
	if i < 0 {
		return rule{}, false
	}
	return layers[i], true
}

func matchesAny(patterns []string, rel string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, rel) })
}

// matches reports whether a path fits a pattern: path.Match's, "a/..." for a and all below it, "..." for everything.
func matches(pattern, rel string) bool {
	if pattern == "..." {
		return true
	}
	if root, ok := strings.CutSuffix(pattern, "/..."); ok {
		return within(root, rel)
	}
	ok, err := path.Match(pattern, rel)
	return err == nil && ok
}

// within reports whether path p is root or lies below it.
func within(root, p string) bool { return p == root || strings.HasPrefix(p, root+"/") }

type pkg struct {
	ImportPath, Name, Doc  string
	Imports, Deps, GoFiles []string
	rel                    string
}

// packages lists the module's own, without their tests.
func packages(t *testing.T) []pkg {
	t.Helper()
	parts.SeeSource()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports,Deps,GoFiles", module+"/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // the static build: what is released
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderrOf(err))
	}
	var list []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p pkg
		if err := dec.Decode(&p); err != nil {
			t.Fatalf("go list: %v", err)
		}
		p.rel = strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if p.Name != "" {
			list = append(list, p)
		}
	}
	if len(list) < 5 {
		t.Fatalf("go list found %d packages: the rules were checked against nothing", len(list))
	}
	return list
}
