package admin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshca/meshca/api/admin/client"
	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/ca/registration"
)

var td = spiffeid.RequireTrustDomainFromString("mesh.example")

// ledger is a list, newest first, that ends as a store's scan does.
type ledger struct {
	entries []ca.LedgerEntry
	seen    int
	err     error
}

func (l *ledger) ScanLedger(_ context.Context, fn func(ca.LedgerEntry) (bool, error)) error {
	l.seen = 0
	for _, e := range l.entries {
		l.seen++
		if more, err := fn(e); err != nil || !more {
			return err
		}
	}
	return l.err
}

// decisions remembers what it was asked and answers with all it has.
type decisions struct {
	all   []registration.Decision
	asked string
	since time.Time
}

func (d *decisions) ByID(id string, n int) []registration.Decision {
	d.asked = fmt.Sprint("id ", id, " ", n)
	return d.all[:min(n, len(d.all))]
}

func (d *decisions) ByPod(ns, name string, n int) []registration.Decision {
	d.asked = fmt.Sprint("pod ", ns, "/", name, " ", n)
	return d.all[:min(n, len(d.all))]
}

func (d *decisions) Since() time.Time { return d.since }

// orderStore keeps what registration.Orders stores.
type orderStore struct {
	mu      sync.Mutex
	denials map[string]ca.Denial
	renew   []ca.RenewOrder
	broken  error
}

func (o *orderStore) PutDenial(_ context.Context, d ca.Denial) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.broken == nil {
		o.denials[d.ID] = d
	}
	return o.broken
}

func (o *orderStore) DeleteDenial(_ context.Context, id string) (bool, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, was := o.denials[id]
	delete(o.denials, id)
	return was, o.broken
}
func (o *orderStore) Denials(context.Context) ([]ca.Denial, error) { return nil, nil }
func (o *orderStore) PutRenewOrder(_ context.Context, r ca.RenewOrder) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.renew = append(o.renew, r)
	return o.broken
}
func (o *orderStore) RenewOrders(context.Context) ([]ca.RenewOrder, error) { return nil, nil }

// oneToken attests one token and refuses others.
type oneToken struct{ evidence attestor.Evidence }

func (o oneToken) Attest(_ context.Context, token attestor.Token, audience string) (attestor.Evidence, error) {
	if token.Secret() != "good" || audience != "meshca" {
		return o.evidence, refusal.New(refusal.TokenExpired, "it ended an hour ago")
	}
	return o.evidence, nil
}

type fixture struct {
	*client.Conn
	ledger    *ledger
	decisions *decisions
	store     *orderStore
	config    Config
	socket    string

	mu    sync.Mutex
	lines []string
}

func (f *fixture) audit(_ context.Context, verb, peer string, attrs ...slog.Attr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines = append(f.lines, fmt.Sprint(verb, " ", peer, " ", attrs))
}

func (f *fixture) audited() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.lines, "\n")
}

func start(t *testing.T, doc string) *fixture {
	t.Helper()
	f := &fixture{ledger: &ledger{}, decisions: &decisions{}, store: &orderStore{denials: map[string]ca.Denial{}}}
	orders, err := registration.OpenOrders(t.Context(), f.store)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := policy.Parse([]byte(doc), policy.PolicyContext{TrustDomain: td, Clusters: []policy.Cluster{{Name: "prod"}}})
	if err != nil {
		t.Fatal(err)
	}
	who, err := attestor.NewIdentity("prod", "shop", "cart")
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	bundle := spiffebundle.New(td)
	if err := bundle.AddJWTAuthority("k1", key.Public()); err != nil {
		t.Fatal(err)
	}
	f.config = Config{
		TrustDomain: td,
		Status: func(context.Context) (*meshcav1.GetStatusResponse, error) {
			return &meshcav1.GetStatusResponse{TrustDomain: td.Name(), Ready: true}, nil
		},
		Checks: func(context.Context) []*meshcav1.Finding {
			return []*meshcav1.Finding{{Subject: "store", Level: levelOK, Detail: "it writes"}}
		},
		Bundle:    func() (*spiffebundle.Bundle, <-chan struct{}) { return bundle, nil },
		Ledger:    f.ledger,
		Decisions: f.decisions,
		Orders:    orders,
		Policy:    func() Policy { return rules },
		Clusters:  map[string]Attestor{"prod": oneToken{attestor.Evidence{Proven: true, Identity: who}}},
		Connected: func() int { return 3 },
		MaxLife:   6 * time.Hour,
		Audit:     f.audit,
		Log:       slog.New(slog.DiscardHandler),
	}
	f.serve(t)
	return f
}

// serve runs the server at a socket until the test ends.
func (f *fixture) serve(t *testing.T) {
	t.Helper()
	s, err := New(f.config)
	if err != nil {
		t.Fatal(err)
	}
	f.socket = filepath.Join(t.TempDir(), "admin.sock")
	l, err := Listen(t.Context(), f.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	f.Conn, err = client.Open(t.Context(), f.socket)
	if err != nil {
		t.Fatal(err)
	}
	conn, socket := f.Conn, f.socket
	t.Cleanup(func() {
		_ = conn.Close()
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
}

func wantReason(t *testing.T, err error, want refusal.Reason) {
	t.Helper()
	if got := refusal.Of(err); got != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func (f *fixture) list(t *testing.T, r *meshcav1.ListSVIDsRequest) []*meshcav1.LedgerEntry {
	t.Helper()
	stream, err := f.CA.ListSVIDs(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	var all []*meshcav1.LedgerEntry
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m.GetEntries()...)
	}
}

func entry(i int, issued time.Duration, life time.Duration, e registration.LedgerEvidence) ca.LedgerEntry {
	js, _ := json.Marshal(e)
	at := time.Now().Add(-issued)
	return ca.LedgerEntry{
		Index: uint64(i), Serial: []byte{0xab, byte(i)}, ID: "spiffe://mesh.example/ns/" + e.Namespace + "/sa/" + e.ServiceAccount,
		Profile: "workload", IssuedAt: at, NotAfter: at.Add(life), AuthorityKeyID: []byte{1}, TBSDigest: []byte{2}, Evidence: js,
	}
}

func TestListSVIDs(t *testing.T) {
	f := start(t, "rules: []")
	shop := registration.LedgerEvidence{Namespace: "shop", ServiceAccount: "cart", Pod: "cart-1", Node: "n1", Cluster: "prod", Rule: "default", Method: "kubernetes/jwks"}
	pay := registration.LedgerEvidence{Namespace: "pay", ServiceAccount: "api", Pod: "api-1", Node: "n2"}
	f.ledger.entries = []ca.LedgerEntry{
		entry(9, time.Minute, 6*time.Hour, shop),
		entry(8, 2*time.Minute, time.Minute, shop), // a short life, ended
		entry(7, time.Hour, 6*time.Hour, pay),
		entry(6, 7*time.Hour, 6*time.Hour, pay), // ended
		entry(5, 8*time.Hour, 6*time.Hour, shop),
	}
	f.ledger.entries[2].Evidence = []byte("{") // damaged
	for name, c := range map[string]struct {
		r    *meshcav1.ListSVIDsRequest
		want string
	}{
		"live":            {&meshcav1.ListSVIDsRequest{}, "9 7"},
		"all":             {&meshcav1.ListSVIDsRequest{IncludeExpired: true}, "9 8 7 6 5"},
		"limit":           {&meshcav1.ListSVIDsRequest{IncludeExpired: true, Limit: 2}, "9 8"},
		"id":              {&meshcav1.ListSVIDsRequest{SpiffeId: "spiffe://mesh.example/ns/pay/sa/api", IncludeExpired: true}, "7 6"},
		"namespace":       {&meshcav1.ListSVIDsRequest{Namespace: "shop", IncludeExpired: true}, "9 8 5"},
		"service account": {&meshcav1.ListSVIDsRequest{ServiceAccount: "api", IncludeExpired: true}, "6"},
		"pod":             {&meshcav1.ListSVIDsRequest{Pod: "cart-1"}, "9"},
		"node":            {&meshcav1.ListSVIDsRequest{Node: "n2", IncludeExpired: true}, "6"},
		"serial":          {&meshcav1.ListSVIDsRequest{Serial: "AB:07"}, "7"},
		"none":            {&meshcav1.ListSVIDsRequest{Namespace: "nowhere"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, e := range f.list(t, c.r) {
				got = append(got, fmt.Sprint(e.GetIndex()))
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("got %v, want %s", got, c.want)
			}
		})
	}
	got := f.list(t, &meshcav1.ListSVIDsRequest{Limit: 1})[0]
	if got.GetSerial() != "ab09" || got.GetEvidence().GetPod() != "cart-1" || got.GetEvidence().GetRule() != "default" || got.GetAuthorityKeyId() != "01" || got.GetTbsDigest() != "02" {
		t.Errorf("got %v", got)
	}
	if f.list(t, &meshcav1.ListSVIDsRequest{}); f.ledger.seen != 4 {
		t.Errorf("read %d entries for the live ones; those after the first that must have ended are not needed", f.ledger.seen)
	}
	for _, r := range []*meshcav1.ListSVIDsRequest{{Limit: MaxEntries + 1}, {Serial: "xyz"}} {
		stream, err := f.CA.ListSVIDs(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		wantReason(t, err, refusal.RequestMalformed)
	}
}

func TestListSVIDsMany(t *testing.T) {
	f := start(t, "rules: []")
	for i := range MaxEntries + 5 {
		f.ledger.entries = append(f.ledger.entries, entry(i, time.Minute, time.Hour, registration.LedgerEvidence{Namespace: "a", ServiceAccount: "b"}))
	}
	if n := len(f.list(t, &meshcav1.ListSVIDsRequest{})); n != DefaultEntries {
		t.Errorf("%d entries without a limit, want %d", n, DefaultEntries)
	}
	if n := len(f.list(t, &meshcav1.ListSVIDsRequest{Limit: MaxEntries})); n != MaxEntries {
		t.Errorf("%d entries, want %d", n, MaxEntries)
	}
}

func TestDenyAllow(t *testing.T) {
	f := start(t, "rules: []")
	const id = "spiffe://mesh.example/ns/shop/sa/cart"
	e := registration.LedgerEvidence{Namespace: "shop", ServiceAccount: "cart"}
	f.ledger.entries = []ca.LedgerEntry{
		entry(3, time.Minute, time.Hour, e), entry(2, time.Minute, 2*time.Hour, e),
		entry(1, time.Minute, 5*time.Hour, registration.LedgerEvidence{Namespace: "other", ServiceAccount: "x"}),
	}
	got, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: id, Why: " stolen laptop "})
	if err != nil {
		t.Fatal(err)
	}
	by := fmt.Sprintf("uid %d", os.Getuid())
	if d := got.GetDenial(); d.GetSpiffeId() != id || d.GetWhy() != "stolen laptop" || d.GetBy() != by || time.Since(d.GetSince().AsTime()) > time.Minute {
		t.Errorf("got %v", d)
	}
	if left := time.Until(got.GetLastNotAfter().AsTime()); got.GetLiveSvids() != 2 || left < 115*time.Minute || left > 2*time.Hour {
		t.Errorf("%d live until %s, want 2 for two hours", got.GetLiveSvids(), left)
	}
	list, err := f.CA.ListDenials(t.Context(), &meshcav1.ListDenialsRequest{})
	if err != nil || len(list.GetDenials()) != 1 || list.GetDenials()[0].GetSpiffeId() != id {
		t.Errorf("denials %v, %v", list, err)
	}
	for _, was := range []bool{true, false} {
		a, err := f.CA.AllowSVID(t.Context(), &meshcav1.AllowSVIDRequest{SpiffeId: id})
		if err != nil || a.GetWasDenied() != was {
			t.Errorf("allow: %v, %v; want %t", a, err, was)
		}
	}
	lines := f.audited()
	for _, want := range []string{
		"svid deny " + by + " [spiffeID=" + id + " why=stolen laptop outcome=done]",
		"svid allow " + by + " [spiffeID=" + id + " wasDenied=true outcome=done]",
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("the audit log lacks %q:\n%s", want, lines)
		}
	}
	if len(f.store.denials) != 0 {
		t.Errorf("the store still has %v", f.store.denials)
	}
}

func TestOrdersRefuse(t *testing.T) {
	f := start(t, "rules: []")
	for name, r := range map[string]*meshcav1.DenySVIDRequest{
		"empty":         {Why: "x"},
		"no ID":         {SpiffeId: "https://mesh.example/a", Why: "x"},
		"other domain":  {SpiffeId: "spiffe://other.example/a", Why: "x"},
		"the domain":    {SpiffeId: "spiffe://mesh.example", Why: "x"},
		"dots":          {SpiffeId: "spiffe://mesh.example/a/../b", Why: "x"},
		"percent":       {SpiffeId: "spiffe://mesh.example/a%2fb", Why: "x"},
		"too long":      {SpiffeId: "spiffe://mesh.example/" + strings.Repeat("a", 2048), Why: "x"},
		"the CA":        {SpiffeId: "spiffe://mesh.example/meshca/server", Why: "x"},
		"no reason":     {SpiffeId: "spiffe://mesh.example/a", Why: "  "},
		"long reason":   {SpiffeId: "spiffe://mesh.example/a", Why: strings.Repeat("x", 201)},
		"two lines":     {SpiffeId: "spiffe://mesh.example/a", Why: "a\nb"},
		"escape in why": {SpiffeId: "spiffe://mesh.example/a", Why: "a\x1b[2J"},
	} {
		_, err := f.CA.DenySVID(t.Context(), r)
		if got := refusal.Of(err); got != refusal.RequestMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, spread := range []time.Duration{-1, MaxSpread + 1} {
		_, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{Spread: durationpb.New(spread)})
		wantReason(t, err, refusal.RequestMalformed)
	}
	_, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{SpiffeId: "spiffe://mesh.example"})
	wantReason(t, err, refusal.RequestMalformed)
	if lines := f.audited(); lines != "" || len(f.store.denials)+len(f.store.renew) != 0 {
		t.Errorf("something was ordered: %s %v %v", lines, f.store.denials, f.store.renew)
	}
}

// An order that failed has an audit line too, and is told with its cause.
func TestOrdersFail(t *testing.T) {
	f := start(t, "rules: []")
	f.store.broken = errors.New("disk full")
	_, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/a", Why: "x"})
	wantReason(t, err, refusal.StoreUnavailable)
	_, err = f.CA.AllowSVID(t.Context(), &meshcav1.AllowSVIDRequest{SpiffeId: "spiffe://mesh.example/a"})
	wantReason(t, err, refusal.StoreUnavailable)
	_, err = f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{})
	wantReason(t, err, refusal.StoreUnavailable)
	for _, verb := range []string{"svid deny", "svid allow", "svid renew"} {
		if lines := f.audited(); !strings.Contains(lines, verb) || strings.Count(lines, "outcome=STORE_UNAVAILABLE") != 3 {
			t.Errorf("audit lines:\n%s", lines)
		}
	}
	// It took effect, and then the ledger failed: the answer says both.
	f.store.broken, f.ledger.err = nil, errors.New("disk on fire")
	_, err = f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/a", Why: "x"})
	wantReason(t, err, refusal.StoreUnavailable)
	if err == nil || !strings.Contains(err.Error(), "is denied, but") || len(f.store.denials) != 1 {
		t.Errorf("%v, stored %v", err, f.store.denials)
	}
}

func TestRenew(t *testing.T) {
	f := start(t, "rules: []")
	got, err := f.CA.RenewSVIDs(t.Context(), &meshcav1.RenewSVIDsRequest{Spread: durationpb.New(10 * time.Minute)})
	if err != nil || got.GetAgentsConnected() != 3 || got.GetOrder().GetSpread().AsDuration() != 10*time.Minute || got.GetOrder().GetSpiffeId() != "" {
		t.Fatalf("got %v, %v", got, err)
	}
	stored := f.store.renew[0]
	if stored.Spread != 10*time.Minute || stored.Until.Sub(stored.IssuedBefore) != 6*time.Hour {
		t.Errorf("stored %+v", stored)
	}
	if !strings.Contains(f.audited(), "svid renew") {
		t.Errorf("audit lines:\n%s", f.audited())
	}
}

func TestExplain(t *testing.T) {
	f := start(t, "rules: []")
	who, _ := attestor.NewIdentity("prod", "shop", "cart")
	f.decisions.all = []registration.Decision{{
		Time: time.Now(), Event: "issue", Door: "grpc", Cluster: "prod", Outcome: "POD_NOT_ON_NODE", Message: "pod runs on node a", Claim: "kubernetes.io.node.uid",
		Caller:   registration.Caller{Address: "10.0.0.1:4", ID: spiffeid.RequireFromPath(td, "/meshca/agent/prod/n1")},
		Evidence: attestor.Evidence{Identity: who, PodName: "cart-1", NodeName: "n1"},
	}, {
		Time: time.Now(), Door: "grpc", Outcome: "issued", ID: spiffeid.RequireFromPath(td, "/ns/shop/sa/cart"), Serial: "ab", NotAfter: time.Now(),
		Caller: registration.Caller{Address: "10.0.0.1:4"}, Rule: "default",
	}}
	got, err := f.CA.Explain(t.Context(), &meshcav1.ExplainRequest{About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Namespace: "shop", Name: "cart-1"}}})
	if err != nil || f.decisions.asked != "pod shop/cart-1 20" || len(got.GetDecisions()) != 2 {
		t.Fatalf("got %v, %v after asking %s", got, err, f.decisions.asked)
	}
	d := got.GetDecisions()[0]
	if d.GetHint() != refusal.PodNotOnNode.Do() || d.GetCaller() != "spiffe://mesh.example/meshca/agent/prod/n1" || d.GetClaim() != "kubernetes.io.node.uid" ||
		d.GetEvidence().GetPod() != "cart-1" || d.GetEvidence().GetCluster() != "prod" || d.GetSpiffeId() != "" || d.GetNotAfter() != nil {
		t.Errorf("got %v", d)
	}
	if d := got.GetDecisions()[1]; d.GetHint() != "" || d.GetCaller() != "10.0.0.1:4" || d.GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || d.GetNotAfter() == nil {
		t.Errorf("got %v", d)
	}
	if time.Since(got.GetSince().AsTime()) > time.Minute {
		t.Errorf("memory since %s; nothing was forgotten since the start", got.GetSince().AsTime())
	}

	const id = "spiffe://mesh.example/ns/shop/sa/cart"
	if _, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: id, Why: "test"}); err != nil {
		t.Fatal(err)
	}
	f.decisions.since = time.Now().Add(-time.Hour)
	got, err = f.CA.Explain(t.Context(), &meshcav1.ExplainRequest{About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: id}, Limit: 1})
	if err != nil || f.decisions.asked != "id "+id+" 1" || len(got.GetDecisions()) != 1 || got.GetDenial().GetWhy() != "test" || time.Since(got.GetSince().AsTime()) < time.Hour {
		t.Errorf("got %v, %v after asking %s", got, err, f.decisions.asked)
	}
	for _, r := range []*meshcav1.ExplainRequest{
		{}, {About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: "x"}}, {About: &meshcav1.ExplainRequest_Pod{Pod: &meshcav1.PodName{Name: "x"}}},
		{About: &meshcav1.ExplainRequest_SpiffeId{SpiffeId: id}, Limit: MaxDecisions + 1},
	} {
		_, err := f.CA.Explain(t.Context(), r)
		wantReason(t, err, refusal.RequestMalformed)
	}
}

func TestTestPolicy(t *testing.T) {
	f := start(t, "rules: [{name: sys, namespaces: [kube-*], deny: no}, {name: no-sys, namespaces: [kube-system], deny: system}, {name: shop, namespaces: [shop], ttl: 1h}]")
	got, err := f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Namespace: "shop", ServiceAccount: "cart"})
	if err != nil || got.GetCluster() != "prod" || got.GetGrant().GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || got.GetGrant().GetTtl().AsDuration() != time.Hour ||
		got.GetGrant().GetRule() != "shop" || len(got.GetRules()) != 3 || got.GetRefusal() != nil {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Cluster: "prod", Namespace: "elsewhere", ServiceAccount: "x"})
	if err != nil || got.GetRefusal().GetReason() != "POLICY_NO_RULE" || got.GetRefusal().GetCode() != uint32(codes.PermissionDenied) || got.GetGrant() != nil || len(got.GetRules()) != 3 {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good"})
	if err != nil || got.GetGrant().GetSpiffeId() != "spiffe://mesh.example/ns/shop/sa/cart" || got.GetNamespace() != "shop" {
		t.Errorf("got %v, %v", got, err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "bad"})
	if err != nil || got.GetRefusal().GetReason() != "TOKEN_EXPIRED" || got.GetServiceAccount() != "cart" || len(got.GetRules()) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := f.CA.DenySVID(t.Context(), &meshcav1.DenySVIDRequest{SpiffeId: "spiffe://mesh.example/ns/shop/sa/cart", Why: "test"}); err != nil {
		t.Fatal(err)
	}
	got, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: "good"})
	if err != nil || got.GetRefusal().GetReason() != "IDENTITY_DENIED" || got.GetGrant() != nil {
		t.Errorf("got %v, %v", got, err)
	}
	for want, r := range map[refusal.Reason]*meshcav1.TestPolicyRequest{
		refusal.ClusterUnknown:   {Cluster: "prd", Namespace: "a", ServiceAccount: "b"},
		refusal.RequestMalformed: {Namespace: "a/b", ServiceAccount: "b"},
	} {
		_, err := f.CA.TestPolicy(t.Context(), r)
		wantReason(t, err, want)
	}
	_, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Namespace: "a", Token: "good"})
	wantReason(t, err, refusal.RequestMalformed)
	_, err = f.CA.TestPolicy(t.Context(), &meshcav1.TestPolicyRequest{Token: strings.Repeat("x", maxMessage)})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request over the bound: %v", err)
	}
}

func TestBundleStatusCheck(t *testing.T) {
	f := start(t, "rules: []")
	b, err := f.CA.GetBundle(t.Context(), &meshcav1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := spiffebundle.Parse(td, b.GetBundle()); err != nil {
		t.Errorf("the bundle: %v", err)
	}
	st, err := f.CA.GetStatus(t.Context(), &meshcav1.GetStatusRequest{})
	if err != nil || st.GetTrustDomain() != "mesh.example" {
		t.Errorf("status %v, %v", st, err)
	}
	c, err := f.CA.Check(t.Context(), &meshcav1.CheckRequest{})
	if err != nil || len(c.GetFindings()) < 3 || c.GetFindings()[len(c.GetFindings())-1].GetDetail() != "it writes" {
		t.Errorf("findings %v, %v", c, err)
	}
}

// A fault is told in full at this socket, and a panic costs one answer.
func TestFaults(t *testing.T) {
	f := start(t, "rules: []")
	f.config.Status = func(context.Context) (*meshcav1.GetStatusResponse, error) {
		return nil, errors.New("the store is locked")
	}
	f.config.Bundle = func() (*spiffebundle.Bundle, <-chan struct{}) { panic("boom") }
	f.serve(t)
	if _, err := f.CA.GetStatus(t.Context(), &meshcav1.GetStatusRequest{}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "the store is locked") {
		t.Errorf("got %v", err)
	}
	_, err := f.CA.GetBundle(t.Context(), &meshcav1.GetBundleRequest{})
	wantReason(t, err, refusal.Internal)
	if _, err := f.CA.ListDenials(t.Context(), &meshcav1.ListDenialsRequest{}); err != nil {
		t.Errorf("after a panic: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	for name, c := range map[string]Config{"empty": {}, "no parts": {TrustDomain: td, MaxLife: time.Hour}} {
		if s, err := New(c); err == nil || s != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.sock")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Mode().Type() != os.ModeSocket {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	_, err = Listen(t.Context(), path)
	wantReason(t, err, refusal.SocketInUse)

	// Left behind by a process that is gone.
	unix, ok := l.(*limited).Listener.(*net.UnixListener)
	if !ok {
		t.Fatal("no unix listener")
	}
	unix.SetUnlinkOnClose(false)
	_ = l.Close()
	l, err = Listen(t.Context(), path)
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	_ = l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]refusal.Reason{
		file: refusal.SocketPath, link: refusal.SocketPath, dir: refusal.SocketPath, filepath.Join(dir, "none", "a.sock"): refusal.SocketPath,
		filepath.Join(dir, strings.Repeat("x", 107)): refusal.SocketPath, filepath.Join(open, "a.sock"): refusal.SocketUnsafeDir,
	} {
		_, err := Listen(t.Context(), path)
		if got := refusal.Of(err); got != want {
			t.Errorf("%s: %v, want %s", path, err, want)
		}
	}
}

// Connections over the limit are closed at once, and the slots come back.
func TestListenLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 2*maxConnections)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	var clients []net.Conn
	for range maxConnections {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		clients = append(clients, c)
	}
	var held []net.Conn
	for range clients {
		held = append(held, <-accepted)
	}
	over, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer over.Close()
	if _, err := over.Read(make([]byte, 1)); err == nil {
		t.Error("a connection over the limit was kept")
	}
	_ = held[0].Close()
	_ = held[0].Close() // twice gives one slot back
	again, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	select {
	case <-accepted:
	case <-time.After(5 * time.Second):
		t.Error("the slot did not come back")
	}
}
