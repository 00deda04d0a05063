package agent

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// Who finds no socket cannot come back: time counts from when there is one.
func TestNobodyComesBackToASocketThatIsNotOpen(t *testing.T) {
	for name, c := range map[string]struct {
		workload Workload
		open     func(*runOf, error)
	}{
		"its own":    {Workload{Socket: "/web.sock"}, func(r *runOf, why error) { r.roster.at("/web.sock").listened(why) }},
		"a source's": {Workload{Socket: "/web.sock", PodUID: "uid"}, func(r *runOf, why error) { r.config.Sources[0].(*entrance).set(why) }},
	} {
		t.Run(name, func(t *testing.T) {
			inCell(t, func(t *testing.T, cell *cell) {
				if c.workload.TokenFile = cell.config.Workloads[0].TokenFile; c.workload.PodUID != "" {
					c.workload.TokenFile = ""
					cell.config.Sources = []Source{&entrance{known: c.workload}}
					cell.config.Workloads = cell.config.Workloads[1:]
				} else {
					cell.config.Workloads[0] = c.workload
				}
				cell.before()
				r := cell.start()
				c.open(r, errors.New("the test says so"))
				r.follow(cell, 2)
				time.Sleep(time.Hour)
				r.says(1, 1, "/web.sock: 2 of the 2 streams that it had before the agent's restart, or before it ended some, have not come back; nobody can come to its socket now")
				c.open(r, nil)
				began := time.Now()
				_, _, err := r.taken(t.Context(), 1, time.Hour)
				if took := time.Since(began); err != nil || took != ComeBack {
					t.Errorf("it is open, and after %v they are given up: %v", took, err)
				}
			})
		})
	}
}

// entrance is a Source by which one pod comes.
type entrance struct {
	known Workload
	mu    sync.Mutex
	since time.Time
	shut  error
}

func (e *entrance) Known() ([]Workload, error)      { return []Workload{e.known}, nil }
func (*entrance) Run(context.Context, *Agent) error { return nil }

func (e *entrance) set(why error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.since, e.shut = time.Now(), why
}

func (e *entrance) OpenSince() (since time.Time, open bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.since, e.shut == nil
}
