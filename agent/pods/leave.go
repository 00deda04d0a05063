package pods

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/meshca/meshca/agent"
)

// away is how long a pod is without a connection when it is taken for one that does not come back by itself.
const away = agent.ComeBack + lookEvery

// leave takes away what the next run need not find. An agent does not know whether it is replaced or ends for good: pods
// that use the socket are to be served by the next one, also with the CA gone. Those that the end of the run before cut
// off may not be back yet, or could not come.
func (s *Source) leave() {
	if !s.config.CleanUp {
		return
	}
	s.forget(s.over(time.Now(), away))
	s.mu.Lock()
	left := len(s.served)
	s.mu.Unlock()
	if dir := filepath.Dir(s.config.Socket); left == 0 && !s.config.mounted(dir) {
		_ = os.Remove(dir) // where somebody else has something in it, it stays
	}
}

// Leftovers are what an agent that had the shared socket left on the node, for one that has it no longer. It is a Source, since
// the agent before may not have ended when the next one is made; it serves nobody.
type Leftovers struct{ config Config }

var _ agent.Source = Leftovers{}

// NewLeftovers takes Socket, StateFile and Log of the configuration that the agent before had.
func NewLeftovers(c Config) Leftovers { return Leftovers{c} }

// Known are none: what is kept of pods that were served is removed.
func (Leftovers) Known() ([]agent.Workload, error) { return nil, nil }

// Run takes the socket, its directory and the state file away. Pods that have the directory mounted would have to be started
// anew if the socket came back.
func (l Leftovers) Run(context.Context, *agent.Agent) error {
	var errs []error
	for _, path := range []string{l.config.StateFile, l.config.StateFile + ".new"} {
		errs = append(errs, gone(os.Remove(path)))
	}
	if info, err := os.Lstat(l.config.Socket); err == nil && info.Mode()&fs.ModeSocket != 0 {
		errs = append(errs, gone(os.Remove(l.config.Socket)))
	}
	if err := gone(os.Remove(filepath.Dir(l.config.Socket))); !errors.Is(err, syscall.ENOTEMPTY) { // else it is not ours alone
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		l.config.Log.Warn("something is left of the shared socket, which is switched off", "error", err)
	}
	return nil
}

// gone is an error but for that of a file that is not there.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
