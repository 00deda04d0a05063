package agent

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// notesBurst is how many lines a socket's peers can have logged of what is wrong with them, at once and in a minute.
	// Counters count everything.
	notesBurst = 5
	notesEvery = time.Minute / notesBurst
)

// notes bounds the lines that the peers of each socket cause, who could have them written for ever otherwise.
type notes map[string]*note

// note is one socket's.
type note struct {
	pace *rate.Limiter

	mu      sync.Mutex
	omitted int // guarded by mu
}

func newNotes(workloads []Workload) notes {
	all := make(notes, len(workloads))
	for _, w := range workloads {
		all[w.Socket] = &note{pace: rate.NewLimiter(rate.Every(notesEvery), notesBurst)}
	}
	return all
}

// allow reports whether a line may be logged for a socket now, and how many were left out since its last one.
func (n notes) allow(socket string) (omitted int, ok bool) {
	of, ok := n[socket]
	if !ok {
		return 0, false
	}
	of.mu.Lock()
	defer of.mu.Unlock()
	if !of.pace.Allow() {
		of.omitted++
		return 0, false
	}
	omitted, of.omitted = of.omitted, 0
	return omitted, true
}
