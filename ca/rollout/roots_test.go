package rollout_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/lint"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/ca/store/bolt"
	"github.com/meshca/meshca/ca/upstream/disk"
	"github.com/meshca/meshca/rotation"
)

var domain = spiffeid.RequireTrustDomainFromString("mesh.test")

// house is a CA on its real parts: bolt, roots on disk, the issuer. Its agents are a list.
type house struct {
	t        *testing.T
	dir      string
	store    *bolt.Store
	upstream *disk.Upstream
	trust    *ca.Trust
	auth     *ca.Authority
	ledger   *ca.Sequencer
	issuer   *ca.Issuer
	roots    *rollout.Roots
	roller   *rotation.Roller
	operator *rollout.Operator
	agents   *agents
	places   places
	journal  journal
	stop     func()
	// makesNone: the upstream cannot make roots, as Vault.
	makesNone bool
	extra     []ca.UpstreamIssuer
	// wrap puts something before the upstream; nil: nothing.
	wrap func(ca.Upstream) ca.Upstream
	// served is how often the CA's own certificate was asked for anew.
	served atomic.Int64
	// unrecorded is until when there may be what the ledger does not know.
	unrecorded time.Time
	// behind is what the wall clock was set forward by.
	behind time.Duration
}

// keeper is an upstream that makes no roots, and has extra issuers.
type keeper struct {
	ca.Upstream
	extra *[]ca.UpstreamIssuer
}

func (k keeper) Issuers(ctx context.Context) ([]ca.UpstreamIssuer, error) {
	issuers, err := k.Upstream.Issuers(ctx)
	return append(issuers, *k.extra...), err
}

// agents stands for the agents that count.
type agents struct {
	mu          sync.Mutex
	unconfirmed []string
	asleep      []string        // unconfirmed, and nothing that is known of lives below them
	renewed     []time.Duration // spreads of the orders given
	marks       []string        // of the orders given
}

func (a *agents) Unconfirmed(_ uint64, at time.Time) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at.IsZero() {
		return slices.Concat(a.unconfirmed, a.asleep)
	}
	return slices.Clone(a.unconfirmed)
}

func (a *agents) confirm() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unconfirmed = nil
}

func (a *agents) RenewAll(_ context.Context, mark string, spread time.Duration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.renewed, a.marks = append(a.renewed, spread), append(a.marks, mark)
	return nil
}

// orders is how many were given.
func (a *agents) orders() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.renewed)
}

// places stand for those where the CA publishes the trust bundle.
type places struct {
	mu  sync.Mutex
	all []rollout.Publication
	set uint64 // that was asked for last
}

func (p *places) published(set uint64) []rollout.Publication {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set = set
	return slices.Clone(p.all)
}

func (p *places) put(all ...rollout.Publication) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all = all
}

// journal is the store's, with a process that dies where it is told to.
type journal struct {
	*bolt.Store
	before, behind func(rotation.Step) error
}

func (j journal) SwapRollout(ctx context.Context, version uint64, next rotation.Rollout) error {
	if j.before != nil {
		if err := j.before(next.Step); err != nil {
			return err
		}
	}
	if err := j.Store.SwapRollout(ctx, version, next); err != nil {
		return err
	}
	if j.behind != nil {
		return j.behind(next.Step)
	}
	return nil
}

func newHouse(t *testing.T) *house {
	t.Helper()
	return newHouseIn(t, t.TempDir())
}

func newHouseIn(t *testing.T, dir string) *house {
	t.Helper()
	h := &house{t: t, dir: dir, agents: &agents{}}
	if _, err := disk.Create(h.files(), disk.CreateOptions{TrustDomain: domain}); err != nil {
		t.Fatal(err)
	}
	h.open()
	t.Cleanup(func() { h.stop() })
	return h
}

func (h *house) files() disk.Files {
	return disk.Files{Cert: filepath.Join(h.dir, "root.crt"), Key: filepath.Join(h.dir, "root.key")}
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// open starts a process on what the last one left.
func (h *house) open() {
	h.t.Helper()
	ctx := h.t.Context()
	var err error
	h.store, err = bolt.Open(filepath.Join(h.dir, "meshca.db"))
	h.must(err)
	h.upstream, err = disk.Open(disk.Options{Root: h.files(), Successors: filepath.Join(h.dir, "roots"), TrustDomain: domain})
	h.must(err)
	issuers, err := h.upstream.Issuers(ctx)
	h.must(err)
	var upstream ca.Upstream = h.upstream
	if h.makesNone {
		upstream = keeper{h.upstream, &h.extra}
	}
	if h.wrap != nil {
		upstream = h.wrap(upstream)
	}
	trust := ca.TrustConfig{TrustDomain: domain, Store: h.store, Roots: []*x509.Certificate{issuers[0].Root}}
	for _, i := range issuers[1:] {
		trust.Others = append(trust.Others, i.Root)
	}
	h.trust, err = ca.NewTrust(ctx, trust)
	h.must(err)
	h.auth, err = ca.NewAuthority(ca.AuthorityConfig{TrustDomain: domain, Upstream: upstream, Trust: h.trust, LeafTTL: ca.MinTTL, Barred: func(above []*x509.Certificate) error {
		s, _ := h.roller.Standing()
		return rollout.Barred(s.Rollout, above)
	}})
	h.must(err)
	h.ledger, err = ca.NewSequencer(ca.SequencerConfig{Store: h.store})
	h.must(err)
	linter, err := lint.New(lint.Options{})
	h.must(err)
	h.issuer, err = ca.NewIssuer(ca.IssuerConfig{Authority: h.auth, Ledger: h.ledger, Linter: linter, Profiles: ca.Profiles(ca.MinTTL)})
	h.must(err)
	h.roots, err = rollout.New(rollout.Config{
		Authority: h.auth, Trust: h.trust, Upstream: upstream, Ledger: h.store, Agents: h.agents, Renewals: h.agents, Serving: func() { h.served.Add(1) },
		Unrecorded: h.unrecorded, Published: h.places.published, Now: func() time.Time { return time.Now().Add(-h.behind) },
	})
	h.must(err)
	h.journal.Store = h.store
	h.roller = rotation.NewRoller(rotation.RollerOptions{Journal: h.journal, Authorities: h.roots, Every: 20 * time.Millisecond})
	r, err := h.roller.Resume(ctx)
	h.must(err)
	h.auth.Assign(rollout.Assignment(r, ca.Root{ID: ca.RootID(issuers[0].Root), Ref: issuers[0].Ref}))
	h.operator = rollout.NewOperator(h.roots, h.roller)
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { h.keep(ctx) })
	h.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		h.ledger.Close()
		h.must(h.store.Close())
	})
	h.eventually("an intermediate", func() bool { return h.auth.Ready() == nil })
}

// keep renews lines as they come, which is what the daemon does.
func (h *house) keep(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	kept := map[*ca.Line]bool{}
	for {
		lines, stale := h.auth.Lines()
		for _, l := range lines {
			if !kept[l] {
				kept[l] = true
				running.Go(func() { _ = rotation.Keep(ctx, l, rotation.KeepOptions{Wake: l.Wake()}) })
			}
		}
		select {
		case <-stale:
		case <-ctx.Done():
			return
		}
	}
}

// run moves the rollout until the returned function is called.
func (h *house) run() (stop func()) {
	ctx, cancel := context.WithCancel(h.t.Context())
	ended := make(chan struct{})
	roller, operator := h.roller, h.operator
	go func() {
		defer close(ended)
		var running sync.WaitGroup
		running.Go(func() { operator.Run(ctx) })
		roller.Run(ctx)
		running.Wait()
	}()
	return func() { cancel(); <-ended }
}

func (h *house) eventually(what string, done func() bool) {
	h.t.Helper()
	for end := time.Now().Add(30 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s, _ := h.roller.Standing()
			h.t.Fatalf("%s did not come: %+v", what, s)
		}
	}
}

func (h *house) step() rotation.Step {
	r, _, err := h.store.Rollout(h.t.Context())
	h.must(err)
	return r.Step
}

func (h *house) at(s rotation.Step) {
	h.t.Helper()
	h.eventually(string(s), func() bool { return h.step() == s })
}

// issue makes an SVID and says which root it is under; it must be one of the bundle.
func (h *house) issue(name string) string {
	h.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.must(err)
	svid, err := h.issuer.Issue(h.t.Context(), ca.Request{
		Grant: ca.Grant{ID: spiffeid.RequireFromPath(domain, "/ns/a/sa/"+name)}, PublicKey: key.Public(), Evidence: []byte(`{"method":"test"}`),
	})
	h.must(err)
	bundle, _ := h.trust.Bundle()
	for _, r := range bundle.X509Authorities() {
		if svid.Chain[len(svid.Chain)-1].CheckSignatureFrom(r) == nil {
			return ca.RootID(r)
		}
	}
	h.t.Fatalf("%s was signed under a root that is not in the bundle", name)
	return ""
}

func (h *house) trusted() (ids []string) {
	bundle, _ := h.trust.Bundle()
	for _, r := range bundle.X509Authorities() {
		ids = append(ids, ca.RootID(r))
	}
	return ids
}

func TestARootIsReplaced(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.agents.unconfirmed = []string{"agent-1"}
	defer h.run()()
	first := h.issue("web")
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{By: "test"})
	h.must(err)
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{}); !errors.Is(err, rotation.ErrRolling) || !strings.Contains(err.Error(), "certctl ca status") {
		t.Errorf("a second rotation: %v", err)
	}
	h.at(rotation.StepPublished)
	if by := h.issue("web"); by != first || len(h.trusted()) != 2 || h.served.Load() != 0 {
		t.Errorf("before it is confirmed %s signs; trusted are %v; the CA's own certificate was replaced %d times", by, h.trusted(), h.served.Load())
	}
	h.agents.confirm()
	h.at(rotation.StepRetired)
	if by := h.issue("web"); by != r.New.ID || h.served.Load() == 0 {
		t.Errorf("behind its confirmation %s signs; the CA's own certificate was replaced %d times", by, h.served.Load())
	}
	if lines, _ := h.auth.Lines(); len(lines) != 1 || lines[0].Root().ID != r.New.ID {
		t.Errorf("%d lines: the old key is still there", len(lines))
	}
	h.at(rotation.StepOut)
	if got := h.trusted(); !slices.Equal(got, []string{r.New.ID}) {
		t.Errorf("trusted are %v", got)
	}
	// A restart signs under the new one, although the configuration names the old one.
	h.stop()
	h.open()
	if by := h.issue("web"); by != r.New.ID {
		t.Errorf("after a restart %s signs", by)
	}
	v, err := h.operator.View(t.Context())
	h.must(err)
	if len(v.Roots) != 1 || v.Roots[0].State != "signing" || v.Roots[0].Live == 0 || v.Roots[0].Line == nil || len(v.Candidates) != 1 || v.Candidates[0].Ref != first {
		t.Errorf("view %+v", v)
	}
}

func TestACanarySignsForItsShare(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	defer h.run()()
	first := h.issue("web")
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Canary: 50})
	h.must(err)
	h.at(rotation.StepCanary)
	h.eventually("the share", func() bool { return h.auth.Assignment().Share == 50 })
	byRoot := map[string]int{}
	for i := range 60 {
		name := fmt.Sprint("w", i)
		by := h.issue(name)
		if again := h.issue(name); again != by {
			t.Fatalf("%s is signed by one root and then by another", name)
		}
		byRoot[by]++
	}
	if byRoot[first] < 10 || byRoot[r.New.ID] < 10 {
		t.Errorf("60 identities: %v", byRoot)
	}
	_, err = h.operator.Continue(t.Context(), nil)
	h.must(err)
	h.at(rotation.StepOut)
	if got := h.trusted(); !slices.Equal(got, []string{r.New.ID}) {
		t.Errorf("trusted are %v", got)
	}
}

func TestAnAbortGoesBack(t *testing.T) {
	t.Parallel()
	for _, canary := range []int{0, 50} {
		t.Run(fmt.Sprint("canary ", canary), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			if canary == 0 {
				h.agents.unconfirmed = []string{"agent-1"}
			}
			defer h.run()()
			first := h.issue("web")
			_, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Canary: canary})
			h.must(err)
			if canary == 0 {
				h.at(rotation.StepPublished)
			} else {
				h.at(rotation.StepCanary)
				h.eventually("the share", func() bool { return h.auth.Assignment().Share == canary })
				for i := range 20 {
					h.issue(fmt.Sprint("w", i))
				}
			}
			_, err = h.operator.Abort(t.Context(), "test")
			h.must(err)
			h.at(rotation.StepOut)
			if got := h.trusted(); !slices.Equal(got, []string{first}) {
				t.Errorf("trusted are %v", got)
			}
			if by := h.issue("web"); by != first {
				t.Errorf("%s signs", by)
			}
			// And then it can be done again.
			h.agents.confirm()
			r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
			h.must(err)
			h.at(rotation.StepOut)
			if got := h.trusted(); !slices.Equal(got, []string{r.New.ID}) {
				t.Errorf("trusted are %v", got)
			}
		})
	}
}

func TestAnEmergencyOrdersRenewals(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.agents.unconfirmed = []string{"agent that is away"}
	defer h.run()()
	h.issue("web")
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: time.Second}); err == nil {
		t.Error("a bound of a second was taken")
	}
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: time.Hour, Canary: 5}); err == nil {
		t.Error("an emergency with a canary was taken")
	}
	begun := time.Now()
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Within: 20 * time.Second})
	h.must(err)
	h.at(rotation.StepOut)
	if took := time.Since(begun); took < 10*time.Second || took > 22*time.Second {
		t.Errorf("it took %s", took)
	}
	if !slices.Equal(h.agents.renewed, []time.Duration{7500 * time.Millisecond}) || !slices.Equal(h.trusted(), []string{r.New.ID}) {
		t.Errorf("renewals %v, trusted %v", h.agents.renewed, h.trusted())
	}
}

// An order to renew is known by the step that it belongs to, also by a process that finds the step in the journal; another
// emergency's has another mark, and what is not a rollout's has none.
func TestAnEmergencyKnowsItsOwnOrder(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	assign := func(r rotation.Rollout) string {
		t.Helper()
		_, err := h.roots.Assign(t.Context(), r)
		h.must(err)
		return h.agents.marks[len(h.agents.marks)-1]
	}
	h.issue("web")
	root, now := h.auth.Assignment().Root, time.Now()
	r := rotation.Rollout{Old: rotation.Party{ID: root.ID, Ref: root.Ref}, New: rotation.Party{ID: root.ID, Ref: root.Ref}, Step: rotation.StepSigning,
		NewShare: 100, Begun: now, Entered: now.Add(time.Second), Within: bound}
	first := assign(r)
	h.must(h.store.SwapRollout(t.Context(), 0, r))
	found, _, err := h.store.Rollout(t.Context())
	h.must(err)
	if again := assign(found); again != first || first == "" {
		t.Errorf("the order of one step is %q, and then %q", first, again)
	}
	for what, another := range map[string]rotation.Rollout{
		"that entered the step again": {Begun: r.Begun, Entered: r.Entered.Add(time.Nanosecond)},
		"that began another time":     {Begun: r.Begun.Add(time.Nanosecond), Entered: r.Entered},
	} {
		next := r
		next.Begun, next.Entered = another.Begun, another.Entered
		if mark := assign(next); mark == first {
			t.Errorf("the order of a rollout %s is the same: %q", what, mark)
		}
	}
	_, err = h.operator.RotateIntermediate(t.Context(), time.Minute)
	h.must(err)
	if mark := h.agents.marks[len(h.agents.marks)-1]; strings.Contains(mark, "rollout") {
		t.Errorf("an order of an operator's has the mark %q", mark)
	}
}

// A ledger that was put back from a backup does not know all that lives under a root: the root stays for as long as that
// may, and what it covers is ordered to renew in an emergency, whatever the ledger knows.
func TestARestoredLedger(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		unrecorded time.Duration
		stays      bool
	}{
		"lately":   {time.Hour, true},
		"long ago": {-time.Hour, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			h.stop()
			h.unrecorded = time.Now().Add(tt.unrecorded)
			h.open()
			old, to := rotation.Party{ID: h.trusted()[0]}, rotation.Party{ID: strings.Repeat("0", 64)}
			r := rotation.Rollout{Step: rotation.StepSigning, Old: old, New: to, NewShare: 100, Within: time.Minute}
			end, err := h.roots.Assign(t.Context(), r)
			h.must(err)
			if tt.stays != end.Equal(h.unrecorded) || tt.stays != (len(h.agents.renewed) == 1) {
				t.Errorf("the last certificate ends at %v, %v; renewals %v", end, h.unrecorded, h.agents.renewed)
			}
		})
	}
}

// A restored store knows too little of who holds what: its agents are waited for though nothing seems to live below them,
// and those that it cannot know have the time that what they may hold can live.
func TestAgentsOfARestoredStoreAreWaitedFor(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	h.stop()
	h.agents.asleep = []string{"agent"}
	const unknown = "reader agents-since-the-backup"
	for _, tt := range []struct {
		what                 string
		unrecorded, setAhead time.Duration
		waits                []string
	}{
		{"restored now", time.Hour, 0, []string{"agent", unknown}},
		{"restored long ago", -time.Minute, 0, nil},
		{"restored now, and the clock was set forward", -time.Minute, time.Hour, []string{"agent", unknown}},
	} {
		h.unrecorded, h.behind = time.Now().Add(tt.unrecorded), tt.setAhead
		h.open()
		waits, err := h.roots.Unconfirmed(t.Context(), 1, time.Now())
		h.must(err)
		if !slices.Equal(waits, tt.waits) {
			t.Errorf("%s: waited for are %q, want %q", tt.what, waits, tt.waits)
		}
		h.stop()
	}
}

// What the clock says has ended since it was set forward lives as far as anyone knows: the root under it stays.
func TestAClockSetForwardEndsNoCertificate(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	old := rotation.Party{ID: h.trusted()[0]}
	entry := ca.LedgerEntry{Serial: []byte{1}, Profile: "workload", IssuedAt: time.Now().Add(-8 * time.Hour), NotAfter: time.Now().Add(-2 * time.Hour)}
	var err error
	entry.Root, err = hex.DecodeString(old.ID)
	h.must(err)
	h.must(h.ledger.Append(t.Context(), entry))
	h.must(h.ledger.Append(t.Context(), ca.LedgerEntry{Serial: []byte{2}, Profile: "workload", Root: make([]byte, 32), IssuedAt: entry.IssuedAt.Add(time.Minute), NotAfter: entry.NotAfter}))
	h.stop()
	h.behind = 7*time.Hour + 30*time.Minute
	h.open()
	r := rotation.Rollout{Step: rotation.StepSigning, Old: old, New: rotation.Party{ID: strings.Repeat("0", 64)}, NewShare: 100}
	end, err := h.roots.Assign(t.Context(), r)
	h.must(err)
	if end.Sub(entry.NotAfter).Abs() > time.Second {
		t.Errorf("the last certificate ends at %s, want %s", end, entry.NotAfter)
	}
}

// A process dies at each entry of the journal, before it and behind it; the next one goes on.
func TestAProcessThatDiesIsFollowedByOneThatGoesOn(t *testing.T) {
	t.Parallel()
	died := errors.New("killed")
	for _, step := range []rotation.Step{
		rotation.StepPublished, rotation.StepConfirmed, rotation.StepSigning, rotation.StepRetired, rotation.StepLeaving, rotation.StepOut,
	} {
		for _, when := range []string{"before", "behind"} {
			t.Run(string(step)+" "+when, func(t *testing.T) {
				t.Parallel()
				h := newHouse(t)
				kill := make(chan struct{})
				once := sync.OnceFunc(func() { close(kill) })
				die := func(s rotation.Step) error {
					if s == step {
						once()
						return died
					}
					return nil
				}
				if when == "before" {
					h.journal.before = die
				} else {
					h.journal.behind = die
				}
				h.stop()
				h.open()
				stop := h.run()
				h.issue("web")
				r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{})
				h.must(err)
				<-kill
				h.issue("web") // what is in hand while it dies
				stop()
				h.stop()
				h.journal = journal{}
				h.open()
				h.issue("web")
				defer h.run()()
				h.at(rotation.StepOut)
				if got := h.trusted(); !slices.Equal(got, []string{r.New.ID}) {
					t.Errorf("trusted are %v", got)
				}
				if by := h.issue("web"); by != r.New.ID {
					t.Errorf("%s signs", by)
				}
			})
		}
	}
}

func TestRotateChooses(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	dry, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{DryRun: true})
	h.must(err)
	if issuers, err := h.upstream.Issuers(t.Context()); err != nil || len(issuers) != 1 || h.step() != "" || dry.Step != rotation.StepChosen {
		t.Errorf("a dry run left %d issuers, step %q, %v", len(issuers), h.step(), err)
	}
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: "another"}); err == nil || !strings.Contains(err.Error(), h.auth.Assignment().Root.Ref) {
		t.Errorf("an issuer that is not there: %v", err)
	}
	if _, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: h.auth.Assignment().Root.Ref}); err == nil || !strings.Contains(err.Error(), "certctl ca rotate intermediate") {
		t.Errorf("a rotation to the root that signs: %v", err)
	}
	for name, err := range map[string]error{
		"continue": second(h.operator.Continue(t.Context(), nil)),
		"despite":  second(h.operator.Continue(t.Context(), []string{"x"})),
		"abort":    second(h.operator.Abort(t.Context(), "test")),
	} {
		if !errors.Is(err, rotation.ErrNotRolling) || !strings.Contains(err.Error(), "certctl ca rotate root") {
			t.Errorf("%s: %v", name, err)
		}
	}
	h.agents.unconfirmed = []string{"agent-1", "agent-2"}
	defer h.run()()
	made, err := h.upstream.NewIssuer(t.Context())
	h.must(err)
	r, err := h.operator.Rotate(t.Context(), rollout.RotateOptions{Issuer: made.Ref})
	h.must(err)
	if r.New.Ref != made.Ref {
		t.Errorf("it goes to %+v", r.New)
	}
	h.at(rotation.StepPublished)
	if _, err := h.operator.Continue(t.Context(), []string{"agent-3"}); err == nil || !strings.Contains(err.Error(), "agent-1, agent-2") || !strings.Contains(err.Error(), "certctl ca status") {
		t.Errorf("giving up someone who is not waited for: %v", err)
	}
	_, err = h.operator.Continue(t.Context(), []string{"agent-1", "agent-2"})
	h.must(err)
	h.at(rotation.StepOut)
}

func TestAnIntermediateIsReplacedAtOnce(t *testing.T) {
	t.Parallel()
	h := newHouse(t)
	lines, _ := h.auth.Lines()
	before := lines[0].Status()
	until, err := h.operator.RotateIntermediate(t.Context(), 0)
	h.must(err)
	after := lines[0].Status()
	if after.Chain[0].Equal(before.Chain[0]) || !until.Equal(before.NotAfter) || len(h.agents.renewed) != 0 {
		t.Errorf("until %s, renewals %v", until, h.agents.renewed)
	}
	_, err = h.operator.RotateIntermediate(t.Context(), time.Minute)
	h.must(err)
	if !slices.Equal(h.agents.renewed, []time.Duration{time.Minute}) {
		t.Errorf("renewals %v", h.agents.renewed)
	}
}

func second[T any](_ T, err error) error { return err }
