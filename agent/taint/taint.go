// Package taint takes the start-up taint off the agent's node: nodes that register with it get no pods before the agent can
// give them identities, and the agent takes it away when that is so.
package taint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/meshca/meshca/agent"
)

// API calls the cluster's API server. An error means that the call had no effect, or that nobody knows. Do is not called
// twice at once.
type API interface {
	Do(ctx context.Context, method, path, contentType string, body []byte) (answer []byte, err error)
}

// Config is what a Remover is made of.
type Config struct {
	// Key of the taint; its value and effect do not matter. Required.
	Key string
	// Node is the node's name; where it is empty, that in the agent's own token.
	Node string
	// API is required.
	API API
	// Log gets what happens; slog.Default where it is nil.
	Log *slog.Logger
}

const (
	// look is how often it is looked whether the agent is ready.
	look = time.Second
	// retry is how long a failure is left alone, and as long again at most.
	retry = 5 * time.Second
)

// Remover removes the taint once, and brings no workloads.
type Remover struct {
	config Config

	mu  sync.Mutex
	err error // of the last try
}

var (
	_ agent.Source   = (*Remover)(nil)
	_ agent.Reporter = (*Remover)(nil)
)

// New makes a Remover, to be handed to one agent.
func New(c Config) (*Remover, error) {
	if c.Key == "" || c.API == nil {
		return nil, errors.New("taint: the taint's key or the API server is missing")
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return &Remover{config: c}, nil
}

// Known are none.
func (*Remover) Known() ([]agent.Workload, error) { return nil, nil }

// Run waits until the agent is ready, and removes the taint. Where that fails it is tried again for as long as it takes:
// without it the node runs nothing.
func (r *Remover) Run(ctx context.Context, a *agent.Agent) error {
	name := r.config.Node
	if name == "" {
		name = a.NodeName()
	}
	r.run(ctx, name, func() bool { return len(a.NotReady()) == 0 })
	return nil
}

func (r *Remover) run(ctx context.Context, node string, ready func() bool) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
	for {
		removed, err := r.Remove(ctx, node)
		if ctx.Err() != nil {
			return
		}
		r.note(err)
		if err == nil {
			r.config.Log.Info("the node has no start-up taint", "node", node, "taint", r.config.Key, "removed", removed)
			break
		}
		r.config.Log.Error("the start-up taint cannot be removed; it is tried again", "node", node, "taint", r.config.Key, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(retry + rand.N(retry)): // apart from other nodes, which may all have come at once
		}
	}
	<-ctx.Done()
}

// node is as much of one as is read: taints as they are, whatever fields they have.
type node struct {
	Metadata struct {
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
	Spec struct {
		Taints []map[string]any `json:"taints"`
	} `json:"spec"`
}

// Remove takes the taint out of those that the node has, unless somebody changed the node meanwhile: then it fails.
func (r *Remover) Remove(ctx context.Context, name string) (removed bool, err error) {
	if name == "" {
		return false, errors.New("the node's name is not known: the agent's token has none, so set csi.nodeName")
	}
	path := "/api/v1/nodes/" + url.PathEscape(name)
	answer, err := r.config.API.Do(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return false, fmt.Errorf("reading the node: %w", err)
	}
	var n node
	if err := json.Unmarshal(answer, &n); err != nil {
		return false, fmt.Errorf("reading the node: %w", err)
	}
	kept := []map[string]any{}
	for _, t := range n.Spec.Taints {
		if t["key"] != r.config.Key {
			kept = append(kept, t)
		}
	}
	if len(kept) == len(n.Spec.Taints) {
		return false, nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": n.Metadata.ResourceVersion},
		"spec":     map[string]any{"taints": kept},
	})
	if err != nil {
		return false, err
	}
	if _, err := r.config.API.Do(ctx, http.MethodPatch, path, "application/merge-patch+json", patch); err != nil {
		return false, fmt.Errorf("changing the node: %w", err)
	}
	return true, nil
}

func (r *Remover) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
}

// Standing shows why the taint is still there.
func (r *Remover) Standing() agent.Standing {
	s := agent.Standing{Subject: "start-up taint", Well: "the node has no taint " + r.config.Key + ", or waits for the agent to be ready"}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		s.Faults = []error{fmt.Errorf("the taint %s cannot be removed from the node: %w", r.config.Key, r.err)}
	}
	return s
}
