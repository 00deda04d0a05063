package kubernetes

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

// What one look of Ended may cost the API server, beside what attestation does.
const (
	endedReads  = 4 // at once
	endedWithin = 2 * time.Second
	// wellFor is for how long an object that was read and found well is not read again, whatever the watch says of it.
	wellFor = 10 * time.Second
)

// Ended tells which of these earlier attestations rest on something that is certainly no more: by their index, the refusal
// that each would meet now. It goes by the watches, in either mode, and takes two things for certain: what the API server
// said of the very object, by UID, and what it answers to one live read of any other that the watches doubt. So neither a
// watch that broke nor one that lags behind, neither a list that has not come nor an API server that is away ends anything:
// who asks again hears of it once it is known.
func (c *Cluster) Ended(ctx context.Context, held []*attestor.Evidence) map[int]*refusal.Error {
	if c.watched == nil {
		return nil
	}
	now := c.now()
	c.wells.forget(now)
	ended, doubts := map[int]*refusal.Error{}, map[thing][]int{}
	for i, ev := range held {
		what, refused, certain := c.doubt(ev, now)
		switch {
		case refused == nil:
		case certain:
			ended[i] = refused
		default:
			doubts[what] = append(doubts[what], i)
		}
	}
	c.settle(ctx, held, doubts, ended)
	return ended
}

// thing is one object of a cluster.
type thing struct {
	kind kind
	name name
}

// doubt finds the first object that does not bear the evidence, as the watches know it.
func (c *Cluster) doubt(ev *attestor.Evidence, now time.Time) (what thing, refused *refusal.Error, certain bool) {
	for k := range kinds {
		what, uid := thing{k, nameOf(k, ev)}, uidOf(k, ev)
		o, found, known := c.watched[k].seen(what.name)
		if !known {
			continue
		}
		refused := judge(k, ev, o, found, now)
		switch {
		case refused == nil, !refused.Reason.EndsLife():
		case c.watched[k].isBuried(uid), found && uid != "" && o.uid == uid:
			return what, refused, true
		case !c.wells.has(what):
			return what, refused, false
		}
	}
	return thing{}, nil, false
}

// settle reads what is doubted, for a while; what it does not come to is doubted again at the next look.
func (c *Cluster) settle(ctx context.Context, held []*attestor.Evidence, doubts map[thing][]int, ended map[int]*refusal.Error) {
	if len(doubts) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, endedWithin)
	defer cancel()
	var reads errgroup.Group
	reads.SetLimit(endedReads)
	var mu sync.Mutex // guards ended
	for what, who := range doubts {
		if ctx.Err() != nil {
			break
		}
		reads.Go(func() error {
			o, found, err := c.api.get(ctx, laneKnown, what.kind, what.name, attestor.Wants{})
			if err != nil {
				return nil // nobody knows
			}
			mu.Lock()
			defer mu.Unlock()
			now := c.now()
			for _, i := range who {
				if refused := judge(what.kind, held[i], o, found, now); refused != nil && refused.Reason.EndsLife() {
					ended[i] = refused
				} else {
					c.wells.note(what, now)
				}
			}
			return nil
		})
	}
	_ = reads.Wait() // none fails
}

// uidOf is the UID that the evidence names for the object; of a namespace it names none.
func uidOf(k kind, ev *attestor.Evidence) string {
	switch k {
	case serviceAccounts:
		return ev.ServiceAccountUID
	case pods:
		return ev.PodUID
	case nodes:
		return ev.NodeUID
	}
	return ""
}

// wells are the objects that were read and found well a short while ago. The zero value is ready.
type wells struct {
	mu sync.Mutex
	at map[thing]time.Time
}

func (w *wells) has(t thing) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.at[t]
	return ok
}

func (w *wells) note(t thing, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.at == nil {
		w.at = map[thing]time.Time{}
	}
	w.at[t] = now
}

func (w *wells) forget(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for t, at := range w.at {
		if now.Sub(at) >= wellFor {
			delete(w.at, t)
		}
	}
}
