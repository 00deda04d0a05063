package test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"testing"

	"github.com/meshca/meshca/test/parts"
)

// dependencies are the modules that go.mod requires directly, each with what it is here for. A new one is a decision:
// it is made here, in the same change.
var dependencies = map[string]string{
	"cel.dev/cel-go":                               "conditions of policy rules: a language that always ends, with a bound on what it costs",
	"github.com/Shopify/toxiproxy/v2":              "tests put a slow network between us and Vault",
	"github.com/cenkalti/backoff/v5":               "jittered exponential backoff for every retry",
	"github.com/container-storage-interface/spec":  "CSI, the interface by which kubelets ask for volumes: its messages",
	"github.com/envoyproxy/go-control-plane/envoy": "Envoy's own SDS and TLS types",
	"github.com/go-jose/go-jose/v4":                "JWT signatures, with a closed list of algorithms",
	"github.com/hashicorp/vault/api":               "Vault's client, and its LifetimeWatcher, for the root that stays in Vault",
	"github.com/prometheus/client_golang":          "/metrics",
	"github.com/rogpeppe/go-internal":              "testscript: command lines are tested as scripts",
	"github.com/rs/zerolog":                        "the logger that toxiproxy wants; it gets one that says nothing",
	"github.com/smallstep/certificates":            "cas/apiv1 and cas/softcas: the signer behind our guard",
	"github.com/spf13/cobra":                       "command lines, completion",
	"github.com/spiffe/go-spiffe/v2":               "the field's own vocabulary: IDs, SVIDs, bundles",
	"github.com/zmap/zcrypto":                      "the certificate type that zlint reads",
	"github.com/zmap/zlint/v3":                     "RFC 5280, 5480 and 8813 as lints",
	"go.etcd.io/bbolt":                             "the store of a single replica",
	"go.step.sm/crypto":                            "keys and PEM of the disk root, and keys in PKCS #11 tokens",
	"go.uber.org/goleak":                           "a test that leaves a goroutine behind fails",
	"golang.org/x/sync":                            "errgroup, singleflight, semaphore",
	"golang.org/x/crypto":                          "cryptobyte, to find what encoding/asn1 passes over in a CSR",
	"golang.org/x/net":                             "netutil, to bound the connections of the agent's sockets",
	"golang.org/x/sys":                             "peer credentials and file locks of unix sockets and stores",
	"golang.org/x/term":                            "whether a person reads the output, and how wide",
	"golang.org/x/time":                            "rate limits for each agent",
	"google.golang.org/genproto/googleapis/rpc":    "google.rpc.ErrorInfo: the form in which a refusal travels",
	"google.golang.org/grpc":                       "every door of our own, and SDS",
	"google.golang.org/protobuf":                   "the wire format's runtime",
	"k8s.io/api":                                   "TokenReview, pods, nodes",
	"k8s.io/apimachinery":                          "their metadata",
	"k8s.io/client-go":                             "the API server: TokenReview, and informers for liveness",
	"k8s.io/kubelet":                               "pluginregistration/v1, by which a kubelet gets to know a CSI driver; that package brings grpc alone",
	"k8s.io/klog/v2":                               "client-go's log lines go where ours go, without their secrets",
	"pgregory.net/rapid":                           "properties of schedules and stores",
	"sigs.k8s.io/json":                             "configuration keys are matched to the letter: encoding/json takes UPSTREAM for upstream",
	"sigs.k8s.io/yaml":                             "configuration and policy, decoded strictly",
}

func TestDirectDependencies(t *testing.T) {
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
		Replace []json.RawMessage
	}
	out, err := exec.Command("go", "mod", "edit", "-json", goMod(t)).Output()
	if err != nil {
		t.Fatalf("go mod edit: %v: %s", err, stderrOf(err))
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	required := map[string]bool{}
	for _, r := range mod.Require {
		if r.Indirect {
			continue
		}
		required[r.Path] = true
		if dependencies[r.Path] == "" {
			t.Errorf("go.mod requires %s directly, and this test names no reason for it", r.Path)
		}
	}
	for path := range dependencies {
		if !required[path] {
			t.Errorf("%s has a reason here, and go.mod does not require it directly", path)
		}
	}
	if len(mod.Replace) > 0 {
		t.Error("go.mod replaces modules: `go install` of a release would not build what was tested")
	}
}

func goMod(t *testing.T) string {
	t.Helper()
	parts.SeeSource() // go.mod, too
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatalf("go env GOMOD: %v: %s", err, stderrOf(err))
	}
	return string(out[:len(out)-1])
}

func stderrOf(err error) string {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(exit.Stderr)
	}
	return ""
}
