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
	err     error
}

func (l *ledger) ScanLedger(_ context.Context, fn func(ca.LedgerEntry) (bool, error)) error {
	for _, e := range l.entries {
		if more, err := fn(e); err != nil || !more {
			return err
		}
	}
	return l.err
}

func (l *ledger) ScanLiving(ctx context.Context, at time.Time, fn func(ca.LedgerEntry) (bool, error)) error {
	return l.ScanLedger(ctx, func(e ca.LedgerEntry) (bool, error) {
		if !e.NotAfter.After(at) {
			return true, nil
		}
		return fn(e)
	})
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
func (o *orderStore) SetRenewOrders(_ context.Context, all []ca.RenewOrder) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.renew = all
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
	operator  operator
	agents    []registration.AgentView
	history   history
	// backupTime, when set, bounds a backup.
	backupTime time.Duration
	snapshot   func(ctx context.Context) (Snapshot, error)
	socket     string

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
	orders, err := registration.OpenOrders(t.Context(), f.store, f.ledger.ScanLiving)
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

		Authorities: &f.operator,
		Roots:       &f.operator,
		Agents:      func() []registration.AgentView { return f.agents },
		Backup:      func(ctx context.Context) (Snapshot, error) { return f.snapshot(ctx) },
		Continuity:  &f.history,
		MaxLife:     6 * time.Hour,
		Audit:       f.audit,
		Log:         slog.New(slog.DiscardHandler),
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
	if f.backupTime > 0 {
		s.backupTime = f.backupTime
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
