package files

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"github.com/meshca/meshca/agent"
)

// maxDirectories bounds those of one agent's configuration.
const maxDirectories = 5000

// Entry is one directory of a workload that the agent's configuration lists.
type Entry struct {
	// Socket is the workload's.
	Socket string
	Config
}

// Source keeps the directories of an agent's own workloads. It adds no workloads.
type Source struct{ entries []Entry }

var _ agent.Source = (*Source)(nil)

// NewSource checks the entries: each as such, and that no two write to the same directory.
func NewSource(entries []Entry) (*Source, error) {
	var errs []error
	if len(entries) > maxDirectories {
		errs = append(errs, fmt.Errorf("%d directories of files: at most %d are kept", len(entries), maxDirectories))
	}
	taken := make(map[string]string)
	for _, e := range entries {
		if err := e.Check(); err != nil {
			errs = append(errs, fmt.Errorf("the files of %s: %w", e.Socket, err))
			continue
		}
		dir := filepath.Clean(e.Dir)
		if by, ok := taken[dir]; ok {
			errs = append(errs, fmt.Errorf("the files of %s: %s already holds those of %s", e.Socket, dir, by))
		}
		taken[dir] = e.Socket
	}
	return &Source{entries}, errors.Join(errs...)
}

// Known is empty: the workloads stand in the configuration.
func (s *Source) Known() ([]agent.Workload, error) { return nil, nil }

// Run keeps all directories until ctx ends.
func (s *Source) Run(ctx context.Context, a *agent.Agent) error {
	var all sync.WaitGroup
	defer all.Wait()
	for _, e := range s.entries {
		k := a.Find(filepath.Clean(e.Socket))
		if k == nil {
			return fmt.Errorf("no workload has the socket %s, whose files are to be kept", e.Socket)
		}
		all.Go(func() {
			_ = Keep(ctx, k, k.NewReader("files in "+filepath.Clean(e.Dir)), e.Config) // NewSource has checked it
		})
	}
	return nil
}
