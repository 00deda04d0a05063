// Package world is a registration authority on the parts that the CA is made of, in a test's process: a bolt store, a
// root on disk, a cluster in jwks mode whose tokens come from a local issuer. Nothing in it is a stand-in.
package world

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/lint"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

// TrustDomain is the world's.
var TrustDomain = spiffeid.RequireTrustDomainFromString("mesh.test")

// Cluster is the name of its cluster. Twin is another of the same tokens, as clusters that share an issuer are.
const (
	Cluster = "one"
	Twin    = "two"
)

// An agent, and a workload beside it on node1.
var (
	Agent = localissuer.Subject{
		Namespace: "meshca", ServiceAccount: "meshca-agent", ServiceAccountUID: "sa-agent", Pod: "agent-1", PodUID: "pod-agent-1", Node: "node1", NodeUID: "uid-node1",
	}
	Web = localissuer.Subject{
		Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa-web", Pod: "web-1", PodUID: "pod-web-1", Node: "node1", NodeUID: "uid-node1",
	}
)

// World is the CA below its doors.
type World struct {
	RA      *registration.Authority
	Tokens  *localissuer.Issuer
	Store   *bolt.Store
	CA      *ca.Authority
	Issuer  *ca.Issuer
	Trust   *ca.Trust
	Journal *registration.Journal
	Audit   *Audit
	// RootKey is the file of the root's key.
	RootKey string
	// Gone, when set, is what both clusters answer when they are asked whether an agent lives: liveness is none in this
	// world, so nobody dies by himself.
	Gone atomic.Pointer[refusal.Error]
	// Ends is what both clusters know to be no more, by the UID of a pod, and why.
	Ends sync.Map // of string to *refusal.Error
	// Facts, when set, is what both clusters gather of any pod; and Pods are those that they know without a token. A cluster
	// without liveness can ask nobody for either.
	Facts atomic.Pointer[attestor.Facts]
	Pods  sync.Map // of attestor.PodRef to attestor.Evidence
	// Unknown, when set, is what both clusters answer when a pod that somebody claims is to be confirmed.
	Unknown atomic.Pointer[refusal.Error]
	// Vouched counts the questions for such pods.
	Vouched atomic.Int64

	T testing.TB
}

// mortal is a cluster whose agents can be made to die, and whose pods are known.
type mortal struct {
	*kubernetes.Cluster
	w *World
}

// Attest adds the world's facts.
func (m mortal) Attest(ctx context.Context, token attestor.Token, audience string) (attestor.Evidence, error) {
	ev, err := m.Cluster.Attest(ctx, token, audience)
	ev.Facts = m.w.Facts.Load()
	return ev, err
}

// AttestDirect adds the world's facts.
func (m mortal) AttestDirect(ctx context.Context, token attestor.Token) (attestor.Evidence, error) {
	ev, err := m.Cluster.AttestDirect(ctx, token)
	ev.Facts = m.w.Facts.Load()
	return ev, err
}

// Vouch knows the world's pods.
func (m mortal) Vouch(ctx context.Context, p attestor.PodRef) (attestor.Evidence, error) {
	m.w.Vouched.Add(1)
	p.Node = ""
	if ev, ok := m.w.Pods.Load(p); ok {
		return ev.(attestor.Evidence), nil
	}
	return m.Cluster.Vouch(ctx, p)
}

// Confirm knows the world's pods.
func (m mortal) Confirm(ctx context.Context, claimed attestor.Evidence) (attestor.Evidence, error) {
	if unknown := m.w.Unknown.Load(); unknown != nil {
		return claimed, unknown
	}
	known, ok := m.w.Pods.Load(attestor.PodRef{Namespace: claimed.Identity.Namespace(), Name: claimed.PodName, UID: claimed.PodUID})
	if !ok {
		return m.Cluster.Confirm(ctx, claimed)
	}
	ev := known.(attestor.Evidence)
	if ev.Identity != claimed.Identity || ev.ServiceAccountUID != claimed.ServiceAccountUID || ev.NodeUID != claimed.NodeUID {
		return claimed, refusal.New(refusal.ClaimUntrue, "the world knows %+v", ev)
	}
	ev.Method, ev.Vouched, ev.Facts = claimed.Method, false, m.w.Facts.Load()
	return ev, nil
}

// Alive says what the test wants, else what the cluster does.
func (m mortal) Alive(ctx context.Context, e attestor.Evidence) error {
	if gone := m.w.Gone.Load(); gone != nil {
		return gone
	}
	return m.Cluster.Alive(ctx, e)
}

// Ended says what the test wants.
func (m mortal) Ended(_ context.Context, held []*attestor.Evidence) map[int]*refusal.Error {
	ended := map[int]*refusal.Error{}
	for i, ev := range held {
		if why, ok := m.w.Ends.Load(ev.PodUID); ok {
			ended[i] = why.(*refusal.Error)
		}
	}
	return ended
}

// Audit is an audit log that a test can read.
type Audit struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write appends a line.
func (a *Audit) Write(p []byte) (int, error) { a.mu.Lock(); defer a.mu.Unlock(); return a.b.Write(p) }

// String is the whole log.
func (a *Audit) String() string { a.mu.Lock(); defer a.mu.Unlock(); return a.b.String() }

// Lines are the log's objects.
func (a *Audit) Lines(t testing.TB) []map[string]any {
	t.Helper()
	var all []map[string]any
	for line := range strings.Lines(a.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("audit line %q: %v", line, err)
		}
		all = append(all, m)
	}
	return all
}

// Last is the log's last object.
func (a *Audit) Last(t testing.TB) map[string]any {
	t.Helper()
	lines := a.Lines(t)
	if len(lines) == 0 {
		t.Fatal("no audit line")
	}
	return lines[len(lines)-1]
}

// New makes a world under these policy rules; "" is the plain ID for all. It ends with the test.
func New(t testing.TB, rules string) *World {
	t.Helper()
	if rules == "" {
		rules = "rules: []"
	}
	dir := t.TempDir()
	w := &World{T: t, Audit: &Audit{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.Tokens, err = localissuer.Open(dir, "https://tokens.test")
	must(err)
	jwks, err := w.Tokens.JWKS()
	must(err)
	keys := filepath.Join(dir, "jwks.json")
	must(os.WriteFile(keys, jwks, 0o600))
	members := map[string]registration.Member{}
	for _, name := range []string{Cluster, Twin} {
		cluster, err := kubernetes.New(kubernetes.Config{
			Name: name, Mode: kubernetes.JWKS, Issuer: "https://tokens.test", Keys: kubernetes.KeysConfig{File: keys}, Liveness: kubernetes.LivenessNone,
		}, kubernetes.Deps{})
		must(err)
		go cluster.Run(t.Context())
		for cluster.Ready() != nil {
			if t.Context().Err() != nil {
				t.Fatal(cluster.Ready())
			}
			time.Sleep(time.Millisecond)
		}
		members[name] = registration.Member{Cluster: mortal{cluster, w}, Agents: []string{"meshca/meshca-agent"}}
	}
	ctx := t.Context()

	w.Store, err = bolt.Open(filepath.Join(dir, "meshca.db"))
	must(err)
	t.Cleanup(func() { _ = w.Store.Close() })
	root := disk.Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
	w.RootKey = root.Key
	_, err = disk.Create(root, disk.CreateOptions{TrustDomain: TrustDomain})
	must(err)
	upstream, err := disk.Open(disk.Options{Root: root, Successors: filepath.Join(dir, "roots"), TrustDomain: TrustDomain})
	must(err)
	issuers, err := upstream.Issuers(ctx)
	must(err)
	named := ca.Root{ID: ca.RootID(issuers[0].Root), Ref: issuers[0].Ref}
	w.Trust, err = ca.NewTrust(ctx, ca.TrustConfig{TrustDomain: TrustDomain, Store: w.Store, Roots: []*x509.Certificate{issuers[0].Root}})
	must(err)
	w.CA, err = ca.NewAuthority(ca.AuthorityConfig{TrustDomain: TrustDomain, Upstream: upstream, Trust: w.Trust})
	must(err)
	_, err = w.CA.Prepare(named).Renew(ctx)
	must(err)
	w.CA.Assign(ca.Assignment{Root: named})
	ledger, err := ca.NewSequencer(ca.SequencerConfig{Store: w.Store})
	must(err)
	t.Cleanup(ledger.Close)
	linter, err := lint.New(lint.Options{})
	must(err)
	w.Issuer, err = ca.NewIssuer(ca.IssuerConfig{Authority: w.CA, Ledger: ledger, Linter: linter, Profiles: ca.Profiles(0)})
	must(err)
	p := w.parse(rules)
	agents, err := registration.OpenAgentBook(ctx, w.Store)
	must(err)
	orders, err := registration.OpenOrders(ctx, w.Store, w.Store.ScanLiving)
	must(err)
	continuity, err := registration.OpenContinuity(ctx, w.Store, w.Trust, agents, slog.New(slog.DiscardHandler))
	must(err)
	w.Journal = registration.NewJournal(w.Audit, registration.NewRing(100), registration.NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	pace, err := registration.NewPace(0)
	must(err)
	w.RA, err = registration.New(registration.Config{
		TrustDomain: TrustDomain, Policy: rotation.NewCurrent(p), Issuer: w.Issuer, Agents: agents, Orders: orders, Endings: registration.NewEndings(), Continuity: continuity,
		AgentTTL: ca.MaxTTL, Pace: pace, Journal: w.Journal,
		Clusters: members,
	})
	must(err)
	return w
}

func (w *World) parse(rules string) *policy.Policy {
	w.T.Helper()
	p, err := policy.Parse([]byte(rules), policy.PolicyContext{
		TrustDomain: TrustDomain, Clusters: []policy.Cluster{{Name: Cluster, SameNamespaces: true}, {Name: Twin, SameNamespaces: true}},
	})
	if err != nil {
		w.T.Fatal(err)
	}
	return p
}

// SetPolicy puts other rules in force.
func (w *World) SetPolicy(rules string) { w.T.Helper(); w.RA.Policy.Set(w.parse(rules)) }

// Token is a token of the subject for an audience, good for an hour.
func (w *World) Token(s localissuer.Subject, audience string) attestor.Token {
	w.T.Helper()
	token, err := w.Tokens.Token(s, audience, time.Hour)
	if err != nil {
		w.T.Fatal(err)
	}
	return attestor.NewToken(token)
}

// NewKey makes a P-256 key.
func NewKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// CSR is a request signed by key.
func CSR(t testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// AttestAgent attests an agent and returns it as a caller.
func (w *World) AttestAgent(s localissuer.Subject) registration.Caller {
	w.T.Helper()
	svid, err := w.RA.AttestAgent(w.T.Context(), registration.Caller{Address: "192.0.2.1:1"}, Cluster, "v1", registration.Request{
		Door: "grpc", Token: w.Token(s, registration.AgentAudience), CSR: CSR(w.T, NewKey(w.T), x509.CertificateRequest{}),
	})
	if err != nil {
		w.T.Fatal(err)
	}
	return registration.Caller{Address: "192.0.2.1:1", ID: svid.ID, Serial: serial.String(svid.Chain[0].SerialNumber), NotAfter: svid.NotAfter}
}

// Issue asks for the subject's SVID with its own token and a new key.
func (w *World) Issue(c registration.Caller, s localissuer.Subject) (ca.SVID, error) {
	w.T.Helper()
	agent, err := w.RA.Admit(w.T.Context(), c, Cluster)
	if err != nil {
		return ca.SVID{}, err
	}
	return w.RA.Issue(w.T.Context(), agent, registration.Request{
		Door: "grpc", Token: w.Token(s, registration.WorkloadAudience), CSR: CSR(w.T, NewKey(w.T), x509.CertificateRequest{}),
	})
}
