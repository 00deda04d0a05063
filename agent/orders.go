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

// orders are the renewal orders that one SVID has to follow. The CA sends all orders at each change: each is timed once.
type orders struct {
	wake func()

	mu     sync.Mutex
	timers map[string]*time.Timer
	ended  bool
}

// apply times what the list orders for h, at the key's place within each order's spread, and forgets what is no longer
// in it.
func (o *orders) apply(list []*meshcav1.RenewOrder, h *held, key string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return
	}
	timers := make(map[string]*time.Timer)
	for _, order := range list {
		name, due := concerns(order, h)
		if !due {
			continue
		}
		if timer, known := o.timers[name]; known {
			timers[name] = timer
			delete(o.timers, name)
			continue
		}
		timers[name] = time.AfterFunc(placeIn(order.GetSpread().AsDuration(), key), o.wake)
	}
	for _, timer := range o.timers {
		timer.Stop()
	}
	o.timers = timers
}

// stop ends all timers, for good.
func (o *orders) stop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, timer := range o.timers {
		timer.Stop()
	}
	o.timers, o.ended = nil, true
}

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

// stop calls nothing any more.
func (s *spread) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
	s.ended = true
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
