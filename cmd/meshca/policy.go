package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/meshca/meshca/ca/policy"
	"github.com/meshca/meshca/rotation"
)

// policyPoll is how often the policy file is read. Reading it whole is cheap, and unlike a watch it sees every way in
// which files are replaced: editors, ConfigMap symlinks, network file systems.
const policyPoll = 2 * time.Second

// policyFile is the policy in force, and how the file as it is now was read.
type policyFile struct {
	config  *Config
	log     *slog.Logger
	current *rotation.Current[*policy.Policy]
	status  *rotation.Current[policyStatus]
	// prepare is told of all policies that may decide from now on; nil: nobody is.
	prepare func(...*policy.Policy)
}

type policyStatus struct {
	loadedAt time.Time
	// err says why the file as it is now is not in force; nil when it is.
	err error
}

// readPolicy reads the policy that the configuration names; without a file it is the plain ID for all.
func (c *Config) readPolicy() (*policy.Policy, error) {
	p, _, err := c.readPolicyBytes()
	return p, err
}

func (c *Config) readPolicyBytes() (*policy.Policy, []byte, error) {
	if c.PolicyFile == "" {
		p, err := policy.Default(c.policyContext())
		return p, nil, err
	}
	data, err := readBounded(c.PolicyFile)
	if err != nil {
		return nil, nil, fmt.Errorf("policy: %w", err)
	}
	p, err := policy.Parse(data, c.policyContext())
	if err != nil {
		return nil, data, fmt.Errorf("policy %s: %w", c.PolicyFile, err)
	}
	return p, data, nil
}

// openPolicy reads the policy for the first time: then, and only then, a bad one is fatal.
func openPolicy(c *Config, log *slog.Logger) (*policyFile, []byte, error) {
	p, data, err := c.readPolicyBytes()
	if err != nil {
		return nil, nil, err
	}
	return &policyFile{config: c, log: log, current: rotation.NewCurrent(p),
		status: rotation.NewCurrent(policyStatus{loadedAt: time.Now()})}, data, nil
}

// watch reads the file again when its content changes. A bad one is refused, and the last good one stays in force.
func (f *policyFile) watch(ctx context.Context, seen []byte) {
	if f.config.PolicyFile == "" {
		return
	}
	tick := time.NewTicker(policyPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			seen = f.look(seen)
		}
	}
}

func (f *policyFile) look(seen []byte) []byte {
	p, data, err := f.config.readPolicyBytes()
	before := f.status.Value()
	switch {
	case err == nil && before.err == nil && bytes.Equal(data, seen):
		return seen
	case err != nil:
		if before.err == nil || before.err.Error() != err.Error() {
			f.log.Error("the policy file was refused; the last good one stays in force", "file", f.config.PolicyFile, "err", err)
			f.status.Set(policyStatus{loadedAt: before.loadedAt, err: err})
		}
		return seen
	}
	if f.prepare != nil {
		f.prepare(f.current.Value(), p)
		defer f.prepare(p)
	}
	f.current.Set(p)
	f.status.Set(policyStatus{loadedAt: time.Now()})
	f.log.Info("the policy is in force", "file", f.config.PolicyFile, "rules", p.Rules())
	return data
}
