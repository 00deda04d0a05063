package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/issuance"
	"github.com/meshca/meshca/api/kubesigner"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/pkcs11"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/upstream/vault"
	"github.com/meshca/meshca/cmd/internal/strictyaml"
)

// maxConfigBytes bounds what is read of a configuration or policy file.
const maxConfigBytes = 4 << 20

// Config is the configuration file of `meshca serve`: YAML, read strictly (an unknown key is an error, also one that
// differs in case alone). This struct is its manual. Paths are relative to the working directory; durations are Go's ("6h",
// "90s").
type Config struct {
	// TrustDomain is the SPIFFE trust domain, such as "mesh.example". Required; it cannot be changed later.
	TrustDomain string `json:"trustDomain"`
	// Listen is the address of the gRPC API. Default ":8443".
	Listen string `json:"listen"`
	// OpsAddress is the address of /livez, /readyz and /metrics, plain HTTP. Default "127.0.0.1:9090".
	OpsAddress string `json:"opsAddress"`
	// AdminSocket is the unix socket that certctl speaks to, mode 0600. Default "/run/meshca/admin.sock".
	AdminSocket string `json:"adminSocket"`
	// StateDir holds the store (meshca.db), and what is kept of intermediates and roots. Default "/var/lib/meshca".
	StateDir string `json:"stateDir"`
	// BundleFile, when set, is kept equal to the trust bundle (SPIFFE JSON with its sequence), for agents on this machine
	// and for whoever distributes it.
	BundleFile string `json:"bundleFile"`
	// Upstream signs this CA's intermediate. Exactly one kind.
	Upstream UpstreamConfig `json:"upstream"`
	// Readers are those who read the trust bundle and cannot acknowledge it, such as whoever copies bundleFile. A root that
	// is being rolled out is confirmed when their refresh times have passed too: since bundleFile holds it, where that is
	// set, and else since it is in the trust bundle. Default: none.
	Readers []ReaderConfig `json:"readers"`
	// SVID is what every SVID has in common.
	SVID SVIDConfig `json:"svid"`
	// Intermediate is this CA's own signing certificate.
	Intermediate IntermediateConfig `json:"intermediate"`
	// Clusters are those whose workloads get identities. At least one.
	Clusters []ClusterConfig `json:"clusters"`
	// PolicyFile holds the rules (see docs/policy.md); it is read again when it changes. Without it every service account
	// of every cluster gets its plain ID.
	PolicyFile string `json:"policyFile"`
	// Audit is where each decision leaves its line.
	Audit AuditConfig `json:"audit"`
	// Ledger is the record of every certificate.
	Ledger LedgerConfig `json:"ledger"`
	// Limits bound what peers of the gRPC API may cost, and pods.
	Limits LimitsConfig `json:"limits"`
	// RememberedDecisions is how many decisions of each of three kinds (issued, refused to someone proven, refused to
	// strangers) `certctl explain` looks back on. Default 10000. Each takes 32 bytes from the start, some 600 when it holds
	// a decision, and 8 KiB with the longest names that can be: by default 1 MiB, about 20, and 240 at most.
	RememberedDecisions int `json:"rememberedDecisions"`
	// LogLevel is debug, info, warn or error. Default info. The log goes to stderr, a JSON object a line.
	LogLevel string `json:"logLevel"`

	trustDomain spiffeid.TrustDomain
	file        string // that it was read from; empty when it was not
}

// UpstreamConfig names who signs the intermediate.
type UpstreamConfig struct {
	// Disk is a root whose key is a file beside the CA.
	Disk *DiskConfig `json:"disk"`
	// Vault is a root that stays in HashiCorp Vault; deploy/vault tells how to set it up.
	Vault *vault.Config `json:"vault"`
}

// DiskConfig is a root on disk. `meshca root create` or `meshca root import` puts it there.
type DiskConfig struct {
	// CertFile is the root's certificate, PEM. Default "<stateDir>/root.crt".
	CertFile string `json:"certFile"`
	// KeyFile is its private key, PEM, mode 0600. Or it is the PKCS #11 URI (RFC 7512) of a key that stays in a token:
	// "pkcs11:token=LABEL;object=LABEL?module-path=/path/to/module.so&pin-source=/path/to/pin". The PIN is in a file with
	// mode 0600, never here. Roots that replace this one are then made in the same token. Only the build meshca-pkcs11 can
	// do that. Default "<stateDir>/root.key".
	KeyFile string `json:"keyFile"`
	// PassphraseFile holds the passphrase of an encrypted key, mode 0600. Default: the key is not encrypted.
	PassphraseFile string `json:"passphraseFile"`
	// ExtraAnchors are PEM files of further roots that the bundle is to hold, such as one that is being replaced. At the
	// start they are added to the bundle; what is taken off this list stays in the bundle and trusted, until
	// `certctl ca root remove` takes it out.
	ExtraAnchors []string `json:"extraAnchors"`
}

// ReaderConfig is someone who reads the trust bundle.
type ReaderConfig struct {
	// Name is for people.
	Name string `json:"name"`
	// Refresh is how old a bundle it may use.
	Refresh metav1.Duration `json:"refresh"`
}

// SVIDConfig is what every SVID has in common.
type SVIDConfig struct {
	// TTL is the life of an SVID, by default and at most: 5s to 6h. Default 6h.
	TTL metav1.Duration `json:"ttl"`
}

// IntermediateConfig is this CA's own signing certificate.
type IntermediateConfig struct {
	// TTL is its life, at least twice that of an SVID; it is renewed at half of it. Default 72h.
	TTL metav1.Duration `json:"ttl"`
	// Key is where its key is.
	Key KeyConfig `json:"key"`
}

// KeyConfig is where the key of the intermediate is, and so whether a start goes on with the intermediate of the last one.
// Wherever it is, it is replaced at half-life, and the old key is destroyed at once.
type KeyConfig struct {
	// In is one of three. Default memory.
	//   memory: it ends with the process, and each start takes a new intermediate. A CA that starts while its upstream is
	//           away signs nothing until that is back.
	//   disk:   in "<stateDir>/intermediates" (mode 0700), in a file with mode 0600. A start goes on with the intermediate
	//           that is kept, if it is good, also while the upstream is away.
	//   pkcs11: in a PKCS #11 token, from which it cannot be taken; otherwise as disk. Only the build meshca-pkcs11 can do
	//           that.
	In string `json:"in"`
	// URI names the token for pkcs11, as upstream.disk.keyFile does. Its object is what the labels of the keys begin with,
	// by default "meshca-intermediate"; it has no id.
	URI string `json:"uri"`

	token pkcs11.URI
}

// ClusterConfig is one Kubernetes cluster.
type ClusterConfig struct {
	kubernetes.Config
	// Agents are the service accounts, "namespace/name", whose pods are meshca agents; nobody else is. Default
	// ["meshca/meshca-agent"].
	Agents []string `json:"agents"`
	// SameNamespaces says that a namespace and service account of this cluster is the same workload as its namesake in
	// the other clusters that say so too. Without it, clusters whose ID templates can collide are refused.
	SameNamespaces bool `json:"sameNamespaces"`
	// Signers has the CA answer requests of the cluster's own certificates API, so that pods have identities without any
	// agent (see docs/kubernetes-signers.md). Default: it answers none.
	Signers kubesigner.Config `json:"signers"`
	// Publish is where in the cluster the trust bundle is published. Default: nowhere.
	Publish kubesigner.PublishConfig `json:"publish"`
}

// check fills in what Signers and Publish leave out, and says what is wrong with them.
func (k *ClusterConfig) check() error {
	if err := k.Signers.Complete(); err != nil {
		return fmt.Errorf("signers.%w", err)
	}
	if err := k.Publish.Complete(); err != nil {
		return fmt.Errorf("publish.%w", err)
	}
	if k.Liveness == kubernetes.LivenessNone && (k.Signers.Enabled() || k.Publish.Enabled()) {
		return errors.New("signers, publish: they need the cluster's API server, and liveness is none")
	}
	return nil
}

// AuditConfig is where audit lines go.
type AuditConfig struct {
	// File gets a JSON object a line, appended; it is made with mode 0600, and one that others can use, or a symlink, is
	// refused. SIGHUP opens it anew after a rotation. Default: stderr.
	File string `json:"file"`
}

// LimitsConfig bounds what others may cost.
type LimitsConfig struct {
	issuance.Limits
	// SVIDsPerPod is how many SVIDs one pod is issued while one of them lives, or within half an hour if that is less; as many
	// again come back evenly in that time. It holds for each door, and for agents' own SVIDs. Beyond it a pod hears POD_LIMIT,
	// keeps what it has and tries again. Each SVID is an entry of the ledger for 30 days, of about 850 bytes. Default 64: 16
	// volumes, each renewed twice in a life, as often again.
	SVIDsPerPod int `json:"svidsPerPod"`
}

// LedgerConfig is the record of every certificate.
type LedgerConfig struct {
	// KeepAfterExpiry is how long an entry stays after its certificate ended. Default 720h (30 days).
	KeepAfterExpiry metav1.Duration `json:"keepAfterExpiry"`
}

// loadConfig reads, completes and checks a configuration file.
func loadConfig(file string) (*Config, error) {
	data, err := readBounded(file)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	c := Config{file: file}
	if err := strictyaml.Decode(data, &c); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", file, err)
	}
	return &c, nil
}

// complete fills in defaults and checks what can be checked without opening anything.
func (c *Config) complete() error {
	set := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	set(&c.Listen, ":8443")
	set(&c.OpsAddress, "127.0.0.1:9090")
	set(&c.AdminSocket, "/run/meshca/admin.sock")
	set(&c.StateDir, "/var/lib/meshca")
	set(&c.LogLevel, "info")
	if c.SVID.TTL.Duration == 0 {
		c.SVID.TTL.Duration = ca.MaxTTL
	}
	if c.Intermediate.TTL.Duration == 0 {
		c.Intermediate.TTL.Duration = ca.DefaultIntermediateLife
	}
	if c.Ledger.KeepAfterExpiry.Duration == 0 {
		c.Ledger.KeepAfterExpiry.Duration = 30 * 24 * time.Hour
	}
	if c.RememberedDecisions == 0 {
		c.RememberedDecisions = 10_000
	}
	if c.Upstream.Disk != nil {
		set(&c.Upstream.Disk.CertFile, filepath.Join(c.StateDir, "root.crt"))
		set(&c.Upstream.Disk.KeyFile, filepath.Join(c.StateDir, "root.key"))
		clean(&c.Upstream.Disk.CertFile)
		if !pkcs11.IsURI(c.Upstream.Disk.KeyFile) {
			clean(&c.Upstream.Disk.KeyFile)
		}
	}
	// What checkPaths compares and what the kernel opens must be one: it would go through a symlink before a "..".
	for _, path := range []*string{&c.StateDir, &c.AdminSocket, &c.BundleFile, &c.Audit.File} {
		clean(path)
	}
	return c.check()
}

func clean(path *string) {
	if *path != "" {
		*path = filepath.Clean(*path)
	}
}

func (c *Config) check() error {
	var err error
	if c.trustDomain, err = trustDomain(c.TrustDomain); err != nil {
		return err
	}
	if err := c.checkAddresses(); err != nil {
		return err
	}
	if err := c.Upstream.check(); err != nil {
		return err
	}
	if err := c.Intermediate.Key.complete(); err != nil {
		return fmt.Errorf("intermediate.key.%w", err)
	}
	ttl, above := c.SVID.TTL.Duration, c.Intermediate.TTL.Duration
	switch {
	case ttl < ca.MinTTL || ttl > ca.MaxTTL:
		return fmt.Errorf("svid.ttl: %s does not lie between %s and %s", ttl, ca.MinTTL, ca.MaxTTL)
	case above < 2*ttl:
		return fmt.Errorf("intermediate.ttl: %s is less than twice svid.ttl (%s): SVIDs would be cut short by their issuer's end", above, ttl)
	case c.Ledger.KeepAfterExpiry.Duration < 0:
		return errors.New("ledger.keepAfterExpiry: it cannot be negative")
	case c.RememberedDecisions < 1 || c.RememberedDecisions > 100_000:
		return fmt.Errorf("rememberedDecisions: %d does not lie between 1 and 100000", c.RememberedDecisions)
	}
	if _, err := logLevel(c.LogLevel); err != nil {
		return err
	}
	if err := c.Limits.Check(); err != nil {
		return fmt.Errorf("limits.%w", err)
	}
	if _, err := registration.NewPace(c.Limits.SVIDsPerPod); err != nil {
		return fmt.Errorf("limits.%w", err)
	}
	if err := c.checkPaths(); err != nil {
		return err
	}
	return c.checkClusters()
}

func (c *Config) checkClusters() error {
	if len(c.Clusters) == 0 {
		return errors.New("clusters: name at least one; without a cluster nobody could be attested")
	}
	seen := map[string]bool{}
	for i := range c.Clusters {
		k := &c.Clusters[i]
		if seen[k.Name] {
			return fmt.Errorf("clusters: two are called %q", k.Name)
		}
		seen[k.Name] = true
		if len(k.Agents) == 0 {
			k.Agents = []string{"meshca/meshca-agent"}
		}
		if err := k.Validate(); err != nil {
			return fmt.Errorf("clusters[%d]: %w", i, err)
		}
		if err := k.check(); err != nil {
			return fmt.Errorf("clusters[%d]: %w", i, err)
		}
		for _, account := range k.Agents {
			ns, sa, _ := strings.Cut(account, "/")
			if _, err := attestor.NewIdentity(k.Name, ns, sa); err != nil {
				return fmt.Errorf("clusters[%d]: agents: %q is not namespace/service-account: %w", i, account, err)
			}
		}
	}
	// Without a policy file the plain IDs are the policy: two clusters may collide already here.
	if c.PolicyFile == "" {
		if _, err := policy.Default(c.policyContext()); err != nil {
			return fmt.Errorf("clusters: %w", err)
		}
	}
	return nil
}

func (c *Config) policyContext() policy.PolicyContext {
	p := policy.PolicyContext{TrustDomain: c.trustDomain, MaxTTL: c.SVID.TTL.Duration}
	for _, k := range c.Clusters {
		p.Clusters = append(p.Clusters, policy.Cluster{Name: k.Name, SameNamespaces: k.SameNamespaces, NoPods: k.Liveness == kubernetes.LivenessNone})
	}
	return p
}

// trustDomain accepts a bare name alone: go-spiffe would take a SPIFFE ID too, and with it a path.
func trustDomain(s string) (spiffeid.TrustDomain, error) {
	if s == "" {
		return spiffeid.TrustDomain{}, errors.New("trustDomain: required, such as \"mesh.example\"")
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil || td.Name() != s {
		return spiffeid.TrustDomain{}, fmt.Errorf("trustDomain: %.255q is no trust domain name: lower-case letters, digits, dots, dashes and underscores", s)
	}
	return td, nil
}

func readBounded(file string) ([]byte, error) {
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%s does not exist", file)
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", file)
	case info.Size() > maxConfigBytes:
		return nil, fmt.Errorf("%s is larger than %d MiB", file, maxConfigBytes>>20)
	}
	return os.ReadFile(file)
}
