package taint

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const key = "meshca.io/agent-not-ready"

// server is an API server with one node.
type server struct {
	taints  string
	fail    atomic.Pointer[error]
	patches []string
	calls   int
}

func (s *server) Do(_ context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	s.calls++
	switch {
	case path != "/api/v1/nodes/node-1":
		return nil, errors.New("no such path: " + path)
	case s.fail.Load() != nil:
		return nil, *s.fail.Load()
	case method == http.MethodGet:
		return []byte(`{"metadata": {"name": "node-1", "resourceVersion": "7"}, "spec": {"podCIDR": "10.0.0.0/24", "taints": ` + s.taints + `}}`), nil
	}
	s.patches = append(s.patches, method+" "+contentType+" "+string(body))
	return []byte("{}"), nil
}

// The taint stays until the agent is ready, and goes alone: other taints stay with all that they have.
func TestTheTaintGoesWhenTheAgentIsReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := &server{taints: `[{"key": "a", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"},
			{"key": "` + key + `", "effect": "NoSchedule"}, {"key": "` + key + `", "value": "x", "effect": "NoExecute"}]`}
		r := remover(t, api)
		var ready atomic.Bool
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.run(ctx, "node-1", func() bool { return ready.Load() }) }()
		time.Sleep(10 * look)
		synctest.Wait()
		if api.calls > 0 {
			t.Errorf("%d calls before the agent was ready", api.calls)
		}
		forbidden := errors.New("forbidden")
		api.fail.Store(&forbidden)
		ready.Store(true)
		time.Sleep(2 * look)
		synctest.Wait()
		if s := r.Standing(); len(s.Faults) != 1 || !strings.Contains(s.Faults[0].Error(), "forbidden") || s.NotReady != nil {
			t.Errorf("the standing does not tell the failure: %+v", s)
		}
		api.fail.Store(nil)
		time.Sleep(2 * retry)
		synctest.Wait()
		want := `PATCH application/merge-patch+json {"metadata":{"resourceVersion":"7"},"spec":{"taints":[{"effect":"NoExecute","key":"a","timeAdded":"2026-01-01T00:00:00Z"}]}}`
		if len(api.patches) != 1 || api.patches[0] != want {
			t.Errorf("changes: %q, want %q alone", api.patches, want)
		}
		if s := r.Standing(); len(s.Faults) != 0 {
			t.Errorf("a fault that has passed is shown: %v", s.Faults)
		}
		calls := api.calls
		time.Sleep(time.Hour)
		synctest.Wait()
		if api.calls != calls {
			t.Error("it goes on asking when the taint is gone")
		}
		cancel()
		<-done
	})
}

func TestANodeWithoutTheTaintIsLeftAlone(t *testing.T) {
	api := &server{taints: `[{"key": "a", "effect": "NoSchedule"}]`}
	if removed, err := remover(t, api).Remove(t.Context(), "node-1"); removed || err != nil || len(api.patches) > 0 {
		t.Errorf("removed %v, %v, changes %q", removed, err, api.patches)
	}
	api.taints = "null"
	if removed, err := remover(t, api).Remove(t.Context(), "node-1"); removed || err != nil || len(api.patches) > 0 {
		t.Errorf("no taints at all: removed %v, %v, changes %q", removed, err, api.patches)
	}
	if _, err := remover(t, api).Remove(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "csi.nodeName") {
		t.Errorf("without a name: %v", err)
	}
	if _, err := New(Config{Key: key}); err == nil {
		t.Error("made without an API server")
	}
}

func remover(t *testing.T, api API) *Remover {
	t.Helper()
	r, err := New(Config{Key: key, API: api, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return r
}
