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

// note bounds the lines that the peers of one socket cause, who could have them written for ever otherwise.
type note struct {
	pace *rate.Limiter

	mu      sync.Mutex
	omitted int // guarded by mu
}

// allow reports whether a line may be logged now, and how many were left out since the last one.
func (n *note) allow() (omitted int, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.pace.Allow() {
		n.omitted++
		return 0, false
	}
	omitted, n.omitted = n.omitted, 0
	return omitted, true
}
