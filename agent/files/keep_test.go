package files

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/rotation"
	"github.com/meshca/meshca/test/pki"
)

// identity is one that a test changes.
type identity struct {
	rotation.Current[agent.Materials]
}

func (i *identity) Materials() (agent.Materials, <-chan struct{}) { return i.Get() }

// reader keeps what it is told.
type reader struct {
	mu     sync.Mutex
	took   []uint64
	failed []string
	shown  agent.Delivery
	closed bool
}

func (r *reader) with(f func()) { r.mu.Lock(); defer r.mu.Unlock(); f() }

func (r *reader) Took(n uint64)         { r.with(func() { r.took = append(r.took, n) }) }
func (r *reader) Failed(err error)      { r.with(func() { r.failed = append(r.failed, err.Error()) }) }
func (r *reader) Show(d agent.Delivery) { r.with(func() { r.shown = d }) }
func (r *reader) Close()                { r.with(func() { r.closed = true }) }

// last is the highest bundle that it was told of.
func (r *reader) last() (n uint64) {
	r.with(func() {
		if len(r.took) > 0 {
			n = r.took[len(r.took)-1]
		}
	})
	return n
}

func (r *reader) delivery() (d agent.Delivery) { r.with(func() { d = r.shown }); return d }

// listener is a process that is told, slowly where takes is set, and says what answer says.
type listener struct {
	mu            sync.Mutex
	takes         time.Duration
	answer        error
	calls, within int
	most          int
	heard         func() // at each call
}

func (l *listener) String() string { return "tell the test" }

func (l *listener) tell(ctx context.Context, _ []string) error {
	l.mu.Lock()
	l.calls++
	l.within++
	l.most = max(l.most, l.within)
	takes, answer, heard := l.takes, l.answer, l.heard
	l.mu.Unlock()
	if heard != nil {
		heard()
	}
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		answer = ctx.Err()
	}
	l.mu.Lock()
	l.within--
	l.mu.Unlock()
	return answer
}

func (l *listener) says(err error) { l.mu.Lock(); defer l.mu.Unlock(); l.answer = err }
func (l *listener) count() int     { l.mu.Lock(); defer l.mu.Unlock(); return l.calls }

// stand is one keeper at work.
type stand struct {
	t      *testing.T
	root   *pki.Root
	config Config
	id     identity
	reader reader
	hook   teller
	stop   func()
}

func newStand(t *testing.T, root *pki.Root, hook teller) *stand {
	return &stand{t: t, root: root, config: configOf(t, TLS, GKE), hook: hook}
}

// start runs the keeper, until the test ends at the latest.
func (s *stand) start() {
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	k := newKeeper(&s.id, &s.reader, s.config, s.hook)
	go func() { defer close(ended); k.keep(ctx) }()
	s.stop = func() { cancel(); <-ended }
	synctest.Wait()
}

// give sets the materials and waits until that is worked off.
func (s *stand) give(svid *x509svid.SVID, sequence uint64) {
	s.id.Set(agent.Materials{SVID: svid, Bundle: s.root.Bundle(sequence)})
	synctest.Wait()
}

func (s *stand) withdraw(sequence uint64) {
	s.id.Set(agent.Materials{Withdrawn: true, Bundle: s.root.Bundle(sequence)})
	synctest.Wait()
}

// svid makes one by the bubble's clock.
func (s *stand) svid() *x509svid.SVID { return newSVID(s.t, s.root) }

func (s *stand) expect(svid *x509svid.SVID) {
	s.t.Helper()
	got, err := readPair(s.config.Dir)
	if svid == nil {
		for _, name := range []string{"tls.key", "tls.crt", "private_key.pem", "certificates.pem"} {
			if _, err := os.Lstat(filepath.Join(s.config.Dir, name)); err == nil {
				s.t.Errorf("%s stands", name)
			}
		}
		return
	}
	if err != nil || !got.Certificates[0].Equal(svid.Certificates[0]) {
		s.t.Errorf("the files hold another SVID, or none: %v", err)
	}
}

// keys counts the files with a key in all generations.
func (s *stand) keys() (n int) {
	found, err := filepath.Glob(filepath.Join(s.config.Dir, "..2*", "tls.key"))
	must(s.t, err)
	return len(found)
}

func TestKeepFollows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, newRoot(t), nil)
		s.id.Set(agent.Materials{Bundle: s.root.Bundle(3)})
		s.start()
		if s.reader.last() != 3 {
			t.Errorf("without an SVID the bundle %d was taken", s.reader.last())
		}
		s.expect(nil)
		var last *x509svid.SVID
		for range 3 {
			last = s.svid()
			s.give(last, 3)
			s.expect(last)
		}
		if n := s.keys(); n < 2 {
			t.Errorf("%d generations with keys: a reader in the midst of the one before loses it", n)
		}
		time.Sleep(linger + time.Second)
		synctest.Wait()
		if n := s.keys(); n != 1 {
			t.Errorf("%d generations with keys are left", n)
		}
		s.give(last, 4)
		if s.reader.last() != 4 || s.reader.delivery().WrittenAt.IsZero() {
			t.Errorf("bundle %d was taken, %+v", s.reader.last(), s.reader.delivery())
		}
		s.stop()
		s.expect(last)
		if !s.reader.closed {
			t.Error("the reader is open still")
		}
	})
}

func TestWhatIsWithdrawnGoesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{}
		s := newStand(t, newRoot(t), l)
		s.give(s.svid(), 1)
		s.start()
		told := l.count()
		s.withdraw(1)
		s.expect(nil)
		if n := s.keys(); n != 0 {
			t.Errorf("%d keys are left", n)
		}
		if _, err := os.ReadFile(filepath.Join(s.config.Dir, "trust_bundles.json")); err != nil {
			t.Errorf("the bundle is gone: %v", err)
		}
		s.withdraw(2)
		if s.reader.last() != 2 || l.count() != told {
			t.Errorf("bundle %d was taken; the process was told %d times, %d before", s.reader.last(), l.count(), told)
		}
		again := s.svid()
		s.give(again, 2)
		s.expect(again)
		time.Sleep(settle)
		synctest.Wait()
		if l.count() != told+1 {
			t.Errorf("told %d times of the SVID that came back", l.count()-told)
		}
		s.stop()
	})
}

// TestWhatIsWithdrawnGoesFromAFullDisk: where nothing can be written, the key is removed all the same.
func TestWhatIsWithdrawnGoesFromAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, newRoot(t), nil)
		s.give(s.svid(), 1)
		s.start()
		must(t, os.WriteFile(filepath.Join(s.config.Dir, "mine"), nil, 0o600))
		must(t, os.Remove(filepath.Join(s.config.Dir, "ca.crt")))
		must(t, os.Mkdir(filepath.Join(s.config.Dir, "ca.crt"), 0o700)) // from now on writing fails
		s.withdraw(1)
		if n := s.keys(); n != 0 || s.reader.delivery().Fault == "" {
			t.Errorf("%d keys are left, %+v", n, s.reader.delivery())
		}
		must(t, os.Remove(filepath.Join(s.config.Dir, "ca.crt")))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		s.expect(nil)
		if s.reader.delivery().Fault != "" {
			t.Errorf("%+v", s.reader.delivery())
		}
		s.stop()
	})
}

func TestWritingIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, newRoot(t), nil)
		must(t, os.WriteFile(s.config.Dir, nil, 0o600))
		svid := s.svid()
		s.give(svid, 1)
		s.start()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		d := s.reader.delivery()
		if d.Failures < 8 || d.Failures > 20 || !strings.Contains(d.Fault, "not a directory") || s.reader.last() != 0 || len(s.reader.failed) != int(d.Failures) {
			t.Errorf("in ten minutes %+v, bundle %d", d, s.reader.last())
		}
		must(t, os.Remove(s.config.Dir))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		s.expect(svid)
		if d := s.reader.delivery(); d.Fault != "" || s.reader.last() != 1 {
			t.Errorf("%+v, bundle %d", d, s.reader.last())
		}
		s.stop()
	})
}

func TestABundleIsTakenWhenTheProcessWasTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{answer: errors.New("it does not want to")}
		s := newStand(t, newRoot(t), l)
		s.give(s.svid(), 5)
		s.start()
		time.Sleep(time.Minute)
		synctest.Wait()
		if d := s.reader.delivery(); s.reader.last() != 0 || d.Fault != "it does not want to" || d.Failures < 3 || d.After != "tell the test" || !d.AfterAt.IsZero() {
			t.Errorf("bundle %d, %+v", s.reader.last(), d)
		}
		l.says(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		d := s.reader.delivery()
		if s.reader.last() != 5 || d.Fault != "" || d.AfterAt.IsZero() {
			t.Errorf("bundle %d, %+v", s.reader.last(), d)
		}
		calls := l.count()
		time.Sleep(time.Hour)
		synctest.Wait()
		if l.count() != calls {
			t.Errorf("told %d times more of nothing new", l.count()-calls)
		}
		s.stop()
	})
}

func TestWhoDoesNotRunHoldsUpNoBundleAndIsToldWhenHeComes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{answer: errNobody}
		s := newStand(t, newRoot(t), l)
		s.give(s.svid(), 5)
		s.start()
		if s.reader.last() != 0 {
			t.Error("taken at the first look: a process that is starting may have read what was there before")
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if d := s.reader.delivery(); s.reader.last() != 5 || d.Fault != "" || d.Failures != 0 {
			t.Errorf("bundle %d, %+v", s.reader.last(), d)
		}
		l.says(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if s.reader.delivery().AfterAt.IsZero() {
			t.Error("it was not told when it came")
		}
		s.stop()
	})
}

// TestOneIsToldAtATime, and what changes while a process is slow is written at once and told after.
func TestOneIsToldAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{takes: time.Minute}
		s := newStand(t, newRoot(t), l)
		s.give(s.svid(), 1)
		s.start()
		var last *x509svid.SVID
		for n := range uint64(5) {
			last = s.svid()
			s.give(last, n+2)
			s.expect(last)
			time.Sleep(5 * time.Second)
		}
		if s.reader.last() != 0 {
			t.Errorf("bundle %d was taken before anybody was told", s.reader.last())
		}
		var found bool
		l.mu.Lock()
		l.heard = func() {
			got, err := readPair(s.config.Dir)
			found = err == nil && got.Certificates[0].Equal(last.Certificates[0])
		}
		l.mu.Unlock()
		time.Sleep(3 * time.Minute)
		synctest.Wait()
		if l.most != 1 || l.calls != 2 || !found || s.reader.last() != 6 {
			t.Errorf("%d at a time, %d times, the last one found the last files: %t; bundle %d", l.most, l.calls, found, s.reader.last())
		}
		s.stop()
	})
}

// TestAProcessIsLeftAloneForAWhile after it was told, and while it starts: it may lose what comes meanwhile.
func TestAProcessIsLeftAloneForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{answer: errStarting}
		s := newStand(t, newRoot(t), l)
		s.give(s.svid(), 1)
		s.start()
		if d := s.reader.delivery(); s.reader.last() != 0 || d.Fault != "" || d.Failures != 0 {
			t.Errorf("of a process that starts: bundle %d, %+v", s.reader.last(), d)
		}
		l.says(nil)
		time.Sleep(settle)
		synctest.Wait()
		if l.count() != 2 || s.reader.last() != 1 {
			t.Errorf("told %d times, bundle %d", l.count(), s.reader.last())
		}
		for n := range uint64(3) {
			s.give(s.svid(), n+2)
		}
		if l.count() != 2 {
			t.Errorf("told %d times more at once", l.count()-2)
		}
		time.Sleep(settle)
		synctest.Wait()
		if l.count() != 3 || s.reader.last() != 4 {
			t.Errorf("told %d times more of three changes, bundle %d", l.count()-2, s.reader.last())
		}
		s.stop()
	})
}

func TestARestartTellsOfWhatWasNotToldAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{answer: errors.New("not now")}
		s := newStand(t, newRoot(t), l)
		svid := s.svid()
		s.give(svid, 1)
		s.start()
		s.stop()
		l.says(nil)
		before := l.count()
		s.start()
		if l.count() != before+1 {
			t.Errorf("after a run that could not tell: told %d times", l.count()-before)
		}
		s.stop()
		s.start()
		if l.count() != before+1 {
			t.Errorf("after a run that told: told %d times more", l.count()-before-1)
		}
		if s.reader.last() != 1 || s.reader.delivery().WrittenAt.IsZero() {
			t.Errorf("bundle %d, %+v", s.reader.last(), s.reader.delivery())
		}
		s.stop()
	})
}

func TestWhatAnEarlierRunLeft(t *testing.T) {
	for name, tt := range map[string]struct {
		then func(*stand, *x509svid.SVID)
	}{
		"stays while the first SVID is awaited, with the bundle of now": {func(s *stand, svid *x509svid.SVID) {
			s.give(nil, 9)
			s.expect(svid)
			if s.reader.last() != 9 {
				s.t.Errorf("bundle %d", s.reader.last())
			}
		}},
		"ends with its own life": {func(s *stand, svid *x509svid.SVID) {
			time.Sleep(time.Until(svid.Certificates[0].NotAfter) + time.Second)
			synctest.Wait()
			s.expect(nil)
			if n := s.keys(); n != 0 {
				s.t.Errorf("%d keys are left", n)
			}
		}},
		"goes when it is withdrawn": {func(s *stand, _ *x509svid.SVID) {
			s.withdraw(2)
			s.expect(nil)
		}},
		"gives way to the first SVID": {func(s *stand, _ *x509svid.SVID) {
			next := s.svid()
			s.give(next, 2)
			s.expect(next)
			s.withdraw(2)
			s.expect(nil)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t, newRoot(t), nil)
				svid := s.svid()
				s.give(svid, 1)
				s.start()
				s.stop()
				s.give(nil, 1)
				s.start()
				s.expect(svid)
				tt.then(s, svid)
				s.stop()
			})
		})
	}
}

// TestWhatAnEarlierRunLeftOfAnotherTrustDomain is nobody's identity here, though its chain leads to a root that is trusted.
func TestWhatAnEarlierRunLeftOfAnotherTrustDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, newRoot(t), nil)
		svid := s.svid()
		s.give(svid, 1)
		s.start()
		s.stop()
		s.root = s.root.As(spiffeid.RequireTrustDomainFromString("other.test"))
		s.give(nil, 7)
		s.start()
		s.expect(nil)
		if n := s.keys(); n != 0 || s.reader.last() != 7 {
			t.Errorf("%d keys are left, the bundle is %d", n, s.reader.last())
		}
		next := s.svid()
		s.give(next, 7)
		s.expect(next)
		s.stop()
	})
}

func TestTheAgentsStopTouchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t, newRoot(t), nil)
		svid := s.svid()
		s.give(svid, 1)
		s.start()
		s.id.Set(agent.Materials{Bundle: s.root.Bundle(2), Withdrawn: true, End: refusal.New(refusal.Stopping, "the agent is stopping")})
		synctest.Wait()
		s.expect(svid)
		s.stop()
	})
}
