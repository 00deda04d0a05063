package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// leave takes away what is kept for the next run, where there is no workload that it would be for. The lock is held.
func (a *Agent) leave() {
	if !a.config.CleanUp || len(a.roster.list()) > 0 {
		return
	}
	err := errors.Join(os.RemoveAll(a.store.dir), os.RemoveAll(a.proxies.dir))
	for _, file := range []string{a.trust.kept, a.denials.path, a.lockPath()} {
		if gone := os.Remove(file); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}
	if err != nil {
		a.log.Warn("something is left of this agent", "error", err)
	}
	// Others may have files in them, or they are mounted here: then they are not ours to remove.
	_ = os.Remove(a.config.StateDir)
	_ = os.Remove(a.config.RuntimeDir)
}

func (a *Agent) lockPath() string { return filepath.Join(a.config.RuntimeDir, "agent.lock") }
