package files

import (
	"fmt"
	"time"

	"github.com/meshca/meshca/agent"
)

// put makes the directory hold these files, with an identity that is whose, and returns the name of their generation, and
// whether they were already there. The generation before stays, for who is reading it.
func put(c Config, want map[string]file, whose agent.Bearer, now time.Time) (generation string, was bool, err error) {
	d, err := openDirectory(c.Dir)
	if err != nil {
		return "", false, err
	}
	defer d.close()
	before := d.current()
	if before != "" && d.holds(before, want, c) {
		if d.bearer(before) != whose { // an earlier version did not say
			err = d.own(before, whose)
		}
		return before, true, err
	}
	s := newSwap(d, c, want, whose, now)
	if err := s.run(); err != nil {
		_ = d.sweep(before, d.current()) // what was begun holds a key
		return "", false, fmt.Errorf("the files cannot be written: %w", err)
	}
	return s.generation, false, nil
}
