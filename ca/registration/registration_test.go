package registration_test

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
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/api/refusal"
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

var (
	td       = spiffeid.RequireTrustDomainFromString("mesh.test")
	agentOn1 = localissuer.Subject{
		Namespace: "meshca", ServiceAccount: "meshca-agent", ServiceAccountUID: "sa-agent", Pod: "agent-1", PodUID: "pod-agent-1", Node: "node1", NodeUID: "uid-node1",
	}
	web = localissuer.Subject{
		Namespace: "shop", ServiceAccount: "web", ServiceAccountUID: "sa-web", Pod: "web-1", PodUID: "pod-web-1", Node: "node1", NodeUID: "uid-node1",
	}
)

// world is a registration authority on the parts that the CA is made of: a bolt store, a root on disk, tokens in
// Kubernetes' form verified in jwks mode.
type world struct {
	t       *testing.T
	ra      *registration.Authority
	tokens  *localissuer.Issuer
	store   *bolt.Store
	ca      *ca.Authority
	trust   *ca.Trust
	journal *registration.Journal
	audit   *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) lines() []map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []map[string]any
	for line := range strings.Lines(s.b.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			panic(err)
		}
		all = append(all, m)
	}
	return all
}

func newWorld(t *testing.T, rules string) *world {
	t.Helper()
	if rules == "" {
		rules = "rules: []"
	}
	dir := t.TempDir()
	w := &world{t: t, audit: &syncBuffer{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	w.tokens, err = localissuer.Open(dir, "https://tokens.test")
	must(err)
	jwks, err := w.tokens.JWKS()
	must(err)
	keys := filepath.Join(dir, "jwks.json")
	must(os.WriteFile(keys, jwks, 0o600))
	cluster, err := kubernetes.New(kubernetes.Config{
		Name: "one", Mode: kubernetes.JWKS, Issuer: "https://tokens.test", Keys: kubernetes.KeysConfig{File: keys}, Liveness: kubernetes.LivenessNone,
	}, kubernetes.Deps{})
	must(err)
	ctx := t.Context()
	go cluster.Run(ctx) //nolint:errcheck // ends with the test
	for cluster.Ready() != nil {
		if ctx.Err() != nil {
			t.Fatal(cluster.Ready())
		}
		time.Sleep(time.Millisecond)
	}

	w.store, err = bolt.Open(filepath.Join(dir, "meshca.db"))
	must(err)
	t.Cleanup(func() { _ = w.store.Close() })
	root := disk.Files{Cert: filepath.Join(dir, "root.crt"), Key: filepath.Join(dir, "root.key")}
	_, err = disk.Create(root, disk.CreateOptions{TrustDomain: td})
	must(err)
	upstream, err := disk.Open(root)
	must(err)
	roots, err := upstream.Roots(ctx)
	must(err)
	w.trust, err = ca.NewTrust(ctx, ca.TrustConfig{TrustDomain: td, Store: w.store, Roots: roots})
	must(err)
	w.ca, err = ca.NewAuthority(ca.AuthorityConfig{TrustDomain: td, Upstream: upstream, Trust: w.trust})
	must(err)
	_, err = w.ca.Renew(ctx)
	must(err)
	ledger, err := ca.NewSequencer(ca.SequencerConfig{Store: w.store})
	must(err)
	t.Cleanup(ledger.Close)
	linter, err := lint.New(lint.Options{})
	must(err)
	issuer, err := ca.NewIssuer(ca.IssuerConfig{Authority: w.ca, Ledger: ledger, Linter: linter, Profiles: ca.Profiles(0)})
	must(err)
	p, err := policy.Parse([]byte(rules), policy.PolicyContext{TrustDomain: td, Clusters: []policy.Cluster{{Name: "one"}}})
	must(err)
	agents, err := registration.OpenAgentBook(ctx, w.store)
	must(err)
	orders, err := registration.OpenOrders(ctx, w.store)
	must(err)
	w.journal = registration.NewJournal(w.audit, registration.NewRing(100), registration.NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	w.ra, err = registration.New(registration.Config{
		TrustDomain: td, Policy: rotation.NewCurrent(p), Issuer: issuer, IsOwnKey: w.ca.IsOwnKey, Agents: agents, Orders: orders,
		AgentTTL: ca.MaxTTL, Journal: w.journal,
		Clusters: map[string]registration.Member{"one": {Cluster: cluster, Agents: []string{"meshca/meshca-agent"}}},
	})
	must(err)
	return w
}

func (w *world) token(s localissuer.Subject, audience string) attestor.Token {
	w.t.Helper()
	token, err := w.tokens.Token(s, audience, time.Hour)
	if err != nil {
		w.t.Fatal(err)
	}
	return attestor.NewToken(token)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t *testing.T, key crypto.Signer, template x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// agent attests an agent and returns it as a caller.
func (w *world) agent(s localissuer.Subject) registration.Caller {
	w.t.Helper()
	svid, err := w.ra.AttestAgent(w.t.Context(), registration.Request{
		Door: "grpc", Cluster: "one", Token: w.token(s, registration.AgentAudience), CSR: csr(w.t, newKey(w.t), x509.CertificateRequest{}),
	}, "v1")
	if err != nil {
		w.t.Fatal(err)
	}
	return registration.Caller{Address: "192.0.2.1:1", ID: svid.ID, Serial: ca.SerialString(svid.Chain[0].SerialNumber), NotAfter: svid.NotAfter}
}

func (w *world) issue(c registration.Caller, s localissuer.Subject) (ca.SVID, error) {
	w.t.Helper()
	return w.ra.Issue(w.t.Context(), registration.Request{
		Door: "grpc", Caller: c, Cluster: "one", Token: w.token(s, registration.WorkloadAudience), CSR: csr(w.t, newKey(w.t), x509.CertificateRequest{}),
	})
}

func TestATokenBecomesAnSVID(t *testing.T) {
	w := newWorld(t, "")
	svid, err := w.issue(w.agent(agentOn1), web)
	if err != nil {
		t.Fatal(err)
	}
	bundle, _ := w.trust.Bundle()
	id, _, err := x509svid.Verify(svid.Chain, x509bundle.FromX509Authorities(td, bundle.X509Authorities()))
	if err != nil {
		t.Fatal(err)
	}
	if want := "spiffe://mesh.test/ns/shop/sa/web"; id.String() != want {
		t.Errorf("issued %s, want %s", id, want)
	}
	line := last(t, w.audit.lines())
	for key, want := range map[string]any{
		"msg": "issue", "outcome": "issued", "spiffeID": id.String(), "namespace": "shop", "serviceAccount": "web", "podUID": "pod-web-1",
		"nodeUID": "uid-node1", "caller": "spiffe://mesh.test/meshca/agent/one/node1", "proven": true, "serial": ca.SerialString(svid.Chain[0].SerialNumber),
	} {
		if line[key] != want {
			t.Errorf("audit line: %s = %v, want %v", key, line[key], want)
		}
	}
	if found := w.journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 || found[0].Outcome != registration.OutcomeIssued {
		t.Errorf("the ring remembers %+v", found)
	}
}

func TestRefusals(t *testing.T) {
	elsewhere := web
	elsewhere.Node, elsewhere.NodeUID = "node2", "uid-node2"
	reborn := web
	reborn.NodeUID = "uid-of-another-node1"
	notAnAgent := agentOn1
	notAnAgent.ServiceAccount = "default"

	tests := map[string]struct {
		rules   string
		caller  func(*world) registration.Caller
		request func(*world, *registration.Request)
		want    refusal.Reason
	}{
		"a pod on another node":             {request: func(w *world, r *registration.Request) { r.Token = w.token(elsewhere, "meshca") }, want: refusal.PodNotOnNode},
		"a node of the same name":           {request: func(w *world, r *registration.Request) { r.Token = w.token(reborn, "meshca") }, want: refusal.PodNotOnNode},
		"an agent's token for a workload":   {request: func(w *world, r *registration.Request) { r.Token = w.token(web, "meshca-agent") }, want: refusal.TokenAudience},
		"an audience that is a prefix":      {request: func(w *world, r *registration.Request) { r.Token = w.token(web, "meshc") }, want: refusal.TokenAudience},
		"no token":                          {request: func(_ *world, r *registration.Request) { r.Token = attestor.NewToken("") }, want: refusal.TokenMissing},
		"an unknown cluster":                {request: func(_ *world, r *registration.Request) { r.Cluster = "two" }, want: refusal.ClusterUnknown},
		"a life too short":                  {request: func(_ *world, r *registration.Request) { r.TTL = time.Second }, want: refusal.RequestMalformed},
		"no CSR":                            {request: func(_ *world, r *registration.Request) { r.CSR = nil }, want: refusal.CSRMalformed},
		"a DNS name that is not granted":    {request: asks(x509.CertificateRequest{DNSNames: []string{"web.shop"}}), want: refusal.CSRAsksMore},
		"another's URI":                     {request: asks(x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "mesh.test", Path: "/ns/shop/sa/db"}}}), want: refusal.CSRAsksMore},
		"no client certificate":             {caller: func(*world) registration.Caller { return registration.Caller{Address: "192.0.2.9:9"} }, want: refusal.DirectNotAllowed},
		"a foreign client certificate":      {caller: func(*world) registration.Caller { return registration.Caller{Untrusted: x509.UnknownAuthorityError{}} }, want: refusal.CallerUntrusted},
		"an agent's SVID that has ended":    {caller: func(w *world) registration.Caller { c := w.agent(agentOn1); c.NotAfter = time.Now(); return c }, want: refusal.AgentExpired},
		"a serial that is not on record":    {caller: func(w *world) registration.Caller { c := w.agent(agentOn1); c.Serial = "00"; return c }, want: refusal.AgentUnknown},
		"a workload's SVID as an agent":     {caller: aWorkload, want: refusal.AgentUnknown},
		"policy without a rule that fits":   {rules: "rules: [{namespaces: [bank]}]", want: refusal.PolicyNoRule},
		"policy that denies":                {rules: "rules: [{name: closed, namespaces: [shop], deny: true}]", want: refusal.PolicyDenied},
		"the CA's own key":                  {request: withOwnKey, want: refusal.CSRKeyIsCA},
		"a denied identity":                 {request: denied("spiffe://mesh.test/ns/shop/sa/web"), want: refusal.IdentityDenied},
		"a denied agent":                    {request: denied("spiffe://mesh.test/meshca/agent/one/node1"), want: refusal.IdentityDenied},
		"a template that yields the agents": {rules: "rules: [{id: \"/{namespace}/agent/one/{serviceAccount}\"}]", request: inNamespace("meshca"), want: refusal.IdentityReserved},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tt.rules)
			caller := w.agent(agentOn1)
			if tt.caller != nil {
				caller = tt.caller(w)
			}
			r := registration.Request{
				Door: "grpc", Caller: caller, Cluster: "one", Token: w.token(web, "meshca"), CSR: csr(t, newKey(t), x509.CertificateRequest{}),
			}
			if tt.request != nil {
				tt.request(w, &r)
			}
			ledger := w.ledgerSize()
			svid, err := w.ra.Issue(t.Context(), r)
			if refusal.Of(err) != tt.want {
				t.Fatalf("got %v (%v), want %s", svid.ID, err, tt.want)
			}
			if now := w.ledgerSize(); now != ledger {
				t.Errorf("the ledger grew by %d entries: something was about to be signed", now-ledger)
			}
			line := last(t, w.audit.lines())
			if line["outcome"] != string(tt.want) || line["message"] == "" {
				t.Errorf("audit line: %v", line)
			}
			if s := r.Token.Secret(); s != "" && strings.Contains(w.audit.b.String(), s) {
				t.Error("the audit log holds a token")
			}
		})
	}
	t.Run("an agent that is not listed", func(t *testing.T) {
		w := newWorld(t, "")
		_, err := w.ra.AttestAgent(t.Context(), registration.Request{
			Door: "grpc", Cluster: "one", Token: w.token(notAnAgent, "meshca-agent"), CSR: csr(t, newKey(t), x509.CertificateRequest{}),
		}, "")
		if refusal.Of(err) != refusal.AgentNotListed {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a workload's token for an agent", func(t *testing.T) {
		w := newWorld(t, "")
		_, err := w.ra.AttestAgent(t.Context(), registration.Request{
			Door: "grpc", Cluster: "one", Token: w.token(agentOn1, "meshca"), CSR: csr(t, newKey(t), x509.CertificateRequest{}),
		}, "")
		if refusal.Of(err) != refusal.TokenAudience {
			t.Fatalf("got %v", err)
		}
	})
}

func TestTTLIsClampedToTheGrant(t *testing.T) {
	w := newWorld(t, "rules: [{namespaces: [shop], ttl: 1h}]")
	agent := w.agent(agentOn1)
	for asked, want := range map[time.Duration]time.Duration{0: time.Hour, 9 * time.Hour: time.Hour, time.Minute: time.Minute} {
		svid, err := w.ra.Issue(t.Context(), registration.Request{
			Door: "grpc", Caller: agent, Cluster: "one", Token: w.token(web, "meshca"), CSR: csr(t, newKey(t), x509.CertificateRequest{}), TTL: asked,
		})
		if err != nil {
			t.Fatal(err)
		}
		if svid.Life != want {
			t.Errorf("asked for %s: a life of %s, want %s", asked, svid.Life, want)
		}
	}
}

func TestAllowLiftsADenial(t *testing.T) {
	w := newWorld(t, "")
	agent, id := w.agent(agentOn1), "spiffe://mesh.test/ns/shop/sa/web"
	_, stale := w.ra.Orders.Get()
	if _, err := w.ra.Orders.Deny(t.Context(), ca.Denial{ID: id, Since: time.Now(), By: "uid 0"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stale:
	default:
		t.Error("who follows the orders was not woken")
	}
	if _, err := w.issue(agent, web); refusal.Of(err) != refusal.IdentityDenied {
		t.Fatalf("got %v", err)
	}
	again, err := registration.OpenOrders(t.Context(), w.store)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := again.Denial(spiffeid.RequireFromString(id)); !ok {
		t.Error("the denial did not outlive the process")
	}
	if was, err := w.ra.Orders.Allow(t.Context(), id); err != nil || !was {
		t.Fatalf("allow: %v, %v", was, err)
	}
	if _, err := w.issue(agent, web); err != nil {
		t.Fatal(err)
	}
}

func TestAgentsOutliveTheProcess(t *testing.T) {
	w := newWorld(t, "")
	agent := w.agent(agentOn1)
	w.ra.Agents.Acknowledge(agent.ID, 7)
	if err := w.ra.Agents.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := registration.OpenAgentBook(t.Context(), w.store)
	if err != nil {
		t.Fatal(err)
	}
	w.ra.Agents = again
	if _, err := w.issue(agent, web); err != nil {
		t.Fatal(err)
	}
	if all := again.List(); len(all) != 1 || all[0].AckedSequence != 7 || all[0].Version != "v1" {
		t.Errorf("the book holds %+v", all)
	}
}

func TestAStrangerCannotMakeTheRingForget(t *testing.T) {
	w := newWorld(t, "rules: [{namespaces: [bank]}]")
	agent := w.agent(agentOn1)
	if _, err := w.issue(agent, web); refusal.Of(err) != refusal.PolicyNoRule {
		t.Fatalf("got %v", err)
	}
	for range 300 {
		_, _ = w.ra.Issue(t.Context(), registration.Request{Door: "grpc", Cluster: "one", Token: attestor.NewToken("made.up.token")})
	}
	if found := w.journal.Ring().ByPod("shop", "web-1", 5); len(found) != 1 {
		t.Errorf("300 made-up tokens later the ring has %d decisions about the pod", len(found))
	}
}

func aWorkload(w *world) registration.Caller {
	svid, err := w.issue(w.agent(agentOn1), web)
	if err != nil {
		w.t.Fatal(err)
	}
	return registration.Caller{ID: svid.ID, Serial: ca.SerialString(svid.Chain[0].SerialNumber), NotAfter: svid.NotAfter}
}

func asks(template x509.CertificateRequest) func(*world, *registration.Request) {
	return func(w *world, r *registration.Request) { r.CSR = csr(w.t, newKey(w.t), template) }
}

func inNamespace(ns string) func(*world, *registration.Request) {
	return func(w *world, r *registration.Request) {
		s := web
		s.Namespace = ns
		r.Token = w.token(s, "meshca")
	}
}

func denied(id string) func(*world, *registration.Request) {
	return func(w *world, _ *registration.Request) {
		if _, err := w.ra.Orders.Deny(context.Background(), ca.Denial{ID: id, Why: "a test", By: "uid 0", Since: time.Now()}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// withOwnKey takes a key that the CA calls its own: made here, so that the CSR's signature holds.
func withOwnKey(w *world, r *registration.Request) {
	key := newKey(w.t)
	own := w.ra.IsOwnKey
	w.ra.IsOwnKey = func(k crypto.PublicKey) bool { return key.PublicKey.Equal(k) || own(k) }
	r.CSR = csr(w.t, key, x509.CertificateRequest{})
}

func (w *world) ledgerSize() uint64 {
	w.t.Helper()
	n, err := w.store.LedgerSize(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

func last(t *testing.T, lines []map[string]any) map[string]any {
	t.Helper()
	if len(lines) == 0 {
		t.Fatal("no audit line")
	}
	return lines[len(lines)-1]
}
