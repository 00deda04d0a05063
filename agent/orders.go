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

// orders are the renewal orders that one SVID has to follow. The CA sends all orders at each change: each is timed once, and
// what is due by one of them no other one puts off.
type orders struct {
	wake func()

	mu    sync.Mutex
	known map[string]bool // those that are timed
	due   spread
}

// apply times what the list orders for h, at the key's place within each order's spread, and forgets what is no longer
// in it.
func (o *orders) apply(list []*meshcav1.RenewOrder, h *held, key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	known := make(map[string]bool)
	for _, order := range list {
		name, concerned := concerns(order, h)
		if !concerned {
			continue
		}
		if known[name] = true; !o.known[name] {
			o.due.after(placeIn(order.GetSpread().AsDuration(), key), o.wake)
		}
	}
	if o.known = known; len(known) == 0 {
		o.due.cancel()
	}
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
	if s.timer != nil {
		s.timer.Stop()
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
