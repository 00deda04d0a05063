package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
)

// maxSpread bounds what an order may put off.
const maxSpread = 24 * time.Hour

// renewals are the renewal orders that the CA's last state had. The zero value is ready.
type renewals struct {
	mu       sync.Mutex
	list     []*meshcav1.RenewOrder
	received time.Time
}

// set takes the whole list. What is held is then to be held to it.
func (r *renewals) set(list []*meshcav1.RenewOrder) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list, r.received = list, time.Now()
}

// hold holds what someone has to the orders that stand: when they come, and whenever he has another SVID, for one that was
// on its way when an order came is named by it, too. Both are asked for here, so that nothing that came since is undone.
func (r *renewals) hold(o *orders, held func() *held, key func() string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o.apply(r.list, r.received, held(), key())
}

// orders are the renewal orders that one SVID has to follow. The CA sends all orders at each change: each calls once, and
// what is due by one of them no other one puts off.
type orders struct {
	wake func()

	mu    sync.Mutex
	known map[string]time.Time // when those that are timed are due
	due   spread
}

// apply times what the list that was received then orders for h, at the key's place within each order's spread, and forgets
// what is no longer in it.
func (o *orders) apply(list []*meshcav1.RenewOrder, received time.Time, h *held, key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	known, now := make(map[string]time.Time), time.Now()
	for _, order := range list {
		name, concerned := concerns(order, h)
		if !concerned {
			continue
		}
		// Told again, it may be due sooner than it was timed, for timers stand still while the machine is suspended. What has
		// been called for is not called for again: a renewal that fails is tried again by itself.
		at, timed := o.known[name]
		if again := moment(order, received, h, key, now); !timed || again.Before(at) {
			at = again
			o.due.after(at.Sub(now), o.wake)
		}
		known[name] = at
	}
	if o.known = known; len(known) == 0 {
		o.due.cancel()
	}
}

// moment is when h is due by an order: the same for whoever hears of it, however late. What is overdue is due soon.
func moment(order *meshcav1.RenewOrder, received time.Time, h *held, key string, now time.Time) time.Time {
	spread := order.GetSpread().AsDuration()
	at := received.Add(placeIn(spread, key) - max(0, order.GetElapsed().AsDuration()))
	if at.Before(now) {
		return now.Add(placeIn(min(spread, h.soon()), key))
	}
	return at
}

// stop ends all timers, for good.
func (o *orders) stop() { o.due.stop() }

// spread is one wake that waits for its moment. The zero value is ready.
type spread struct {
	mu    sync.Mutex
	timer *time.Timer
	due   time.Time
	ended bool
}

// after calls f in d, unless a call is due before that already.
func (s *spread) after(d time.Duration, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	at := now.Add(d)
	if s.ended || s.timer != nil && s.due.After(now) && !s.due.After(at) {
		return
	}
	if s.timer != nil && s.timer.Stop() && s.due.Before(at) { // it is due, and has not been called yet
		at, d = s.due, 0
	}
	s.timer, s.due = time.AfterFunc(d, f), at
}

// cancel does not call what is due.
func (s *spread) cancel() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

// stop calls nothing any more.
func (s *spread) stop() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.cancel()
}

// concerns reports whether the order names the SVID and came after its issue, and gives the order a name.
func concerns(order *meshcav1.RenewOrder, h *held) (name string, due bool) {
	if h == nil || order.GetIssuedBefore().CheckValid() != nil {
		return "", false
	}
	before := order.GetIssuedBefore().AsTime()
	if id := order.GetSpiffeId(); id != "" {
		if named, err := spiffeid.FromString(id); err != nil || named != h.svid.ID {
			return "", false
		}
	}
	if !h.issued().Before(before) {
		return "", false
	}
	return fmt.Sprintf("%s|%d", order.GetSpiffeId(), before.UnixNano()), true
}

// placeIn is the key's own moment within the spread, so that a fleet that is ordered at once renews evenly.
func placeIn(spread time.Duration, key string) time.Duration {
	spread = min(spread, maxSpread)
	if spread <= 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(key))
	return time.Duration(binary.BigEndian.Uint64(sum[8:16]) % uint64(spread))
}
