package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/api/kubesigner"
	"github.com/meshca/meshca/attestor/kubernetes"
	"github.com/meshca/meshca/rotation"
)

// shelf is an API server that keeps the one object that is put there.
type shelf struct {
	mu     sync.Mutex
	object map[string]any
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.Method != http.MethodGet:
		var object map[string]any
		if err := json.NewDecoder(r.Body).Decode(&object); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		s.object = object
		fallthrough
	case s.object != nil && r.URL.Query().Get("watch") == "":
		_ = json.NewEncoder(w).Encode(s.object)
	default:
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: http.StatusNotFound,
		})
	}
}

// kubeconfig leads to a server.
func kubeconfig(t *testing.T, server *httptest.Server) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "kubeconfig")
	root := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	text := fmt.Sprintf(`{clusters: [{name: a, cluster: {server: %q, certificate-authority-data: %s}}], users: [{name: u, user: {token: t}}],
		contexts: [{name: c, context: {cluster: a, user: u}}], current-context: c}`, server.URL, root)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// A wall clock that was set forward makes no rollout wait longer for a place in a cluster: since when that holds a bundle is
// said by the clock that rollouts go by. Whom they wait for is shown by it, too.
func TestAPlaceInAClusterHasTheRolloutsClock(t *testing.T) {
	api := httptest.NewTLSServer(&shelf{})
	defer api.Close()
	dir := t.TempDir()
	cluster := clusterIn(t, dir, "a", false)
	cluster.Kubeconfig, cluster.Liveness = kubeconfig(t, api), kubernetes.LivenessAPI
	cluster.Publish.Agents = &kubesigner.ConfigMapConfig{}
	c := configIn(t, dir, cluster)
	holds(t, c, -time.Hour)
	const jump = 7 * time.Hour // time.Now is ahead of the clock by this much
	clock := rotation.NewClock(rotation.ClockOptions{Wall: func() time.Time { return time.Now().Add(-jump) }})
	d, err := openBy(t.Context(), clock, c, slog.New(slog.DiscardHandler), io.Discard, openUpstream)
	if err != nil {
		t.Fatal(err)
	}
	endWith(t, d)
	server, err := d.adminServer()
	if err != nil {
		t.Fatal(err)
	}
	authorities, err := server.GetAuthorities(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if waits := d.agents.Unconfirmed(9, d.clock.Now()); len(waits) != 1 || len(authorities.GetAgents()) != 1 {
		t.Errorf("a rollout waits for %q, and shown are %v", waits, authorities.GetAgents())
	}
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	for p := range maps.Values(d.publishers) {
		running.Go(func() { p.Run(ctx) })
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		places := d.published(1)
		if len(places) == 1 && !places[0].Since.IsZero() {
			if ahead := places[0].Since.Sub(d.clock.Now()); ahead > 0 {
				t.Errorf("%s holds it since %s from now on, as rollouts reckon", places[0].Name, ahead)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatalf("it is not published: %+v", places)
		}
	}
}
