package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"

	"github.com/meshca/meshca/agent"
)

// maxState bounds what is read of the state file, in bytes: a thousand UIDs take forty kilobytes.
const maxState = 1 << 20

// state is the state file. It holds no secret: the keys are the agent's to keep.
type state struct {
	Pods []string `json:"pods"`
}

// Known are the pods that an earlier run served. What is kept of them is served when they come again, also with the CA gone.
func (s *Source) Known() ([]agent.Workload, error) {
	var known []agent.Workload
	for _, uid := range s.kept() {
		known = append(known, s.workload(uid))
	}
	return known, nil
}

// kept reads the state file; one that cannot be read is none: the pods are asked for anew when they come.
func (s *Source) kept() []string {
	text, err := readState(s.config.StateFile)
	var kept state
	if err == nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.config.Log.Warn("the state of the shared socket cannot be used; its pods are asked for anew", "file", s.config.StateFile, "error", err)
		}
		return nil
	}
	return kept.Pods[:min(len(kept.Pods), maxPods)]
}

func readState(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxState+1))
	if err == nil && len(text) > maxState {
		err = fmt.Errorf("it is larger than %d bytes", maxState)
	}
	return text, err
}

// save writes the state file, and takes it away where there is no pod to remember: an agent that leaves its node for good
// leaves nothing there. s.mu is held.
func (s *Source) save() {
	err := s.write()
	if err != nil && s.saved == nil {
		s.config.Log.Error("the state of the shared socket cannot be kept; a restart with the CA gone will not know its pods", "file", s.config.StateFile, "error", err)
	}
	s.saved = err
}

// write writes the file. It lies on a tmpfs, with the keys: what a crash of the machine takes is gone together.
func (s *Source) write() error {
	if len(s.served) == 0 {
		if err := os.Remove(s.config.StateFile); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	text, err := json.Marshal(state{slices.Sorted(maps.Keys(s.served))})
	if err != nil {
		return err
	}
	next := s.config.StateFile + ".new"
	if err := os.WriteFile(next, text, 0o600); err != nil {
		return err
	}
	return os.Rename(next, s.config.StateFile)
}
