package kubesigner

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"path"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/test/world"
)

// apiServer is an API server's certificates API at the wire: one kind of object, resource versions that are held, and faults
// where a test wants them. test/kubesigner has a real one.
type apiServer struct {
	*httptest.Server
	conf *rest.Config
	skew time.Duration

	mu       sync.Mutex
	versions []string // of podcertificaterequests
	objects  map[string]map[string]any
	version  int
	changed  chan struct{} // closes at the next change
	asked    []string      // method and path of each call that changes something
	// before and after are asked at each patch; true: they have answered it. What after answers has taken effect.
	before, after func(w http.ResponseWriter, r *http.Request) bool
}

func newAPIServer(t *testing.T, versions ...string) *apiServer {
	s := &apiServer{versions: versions, objects: map[string]map[string]any{}, changed: make(chan struct{})}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.CloseClientConnections) // watches never end by themselves
	t.Cleanup(s.Close)
	s.conf = &rest.Config{Host: s.URL}
	return s
}

func (s *apiServer) REST() (*rest.Config, *http.Client) { return s.conf, s.Client() }
func (s *apiServer) Doubt()                             {}
func (s *apiServer) ClockSkew() time.Duration           { s.mu.Lock(); defer s.mu.Unlock(); return s.skew }

func (s *apiServer) do(f func()) { s.mu.Lock(); defer s.mu.Unlock(); f() }

// put stores an object under its name and tells those who watch.
func (s *apiServer) put(o map[string]any) {
	s.version++
	meta := o["metadata"].(map[string]any)
	meta["resourceVersion"] = strconv.Itoa(s.version)
	s.objects[meta["name"].(string)] = o
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case strings.HasSuffix(r.URL.Path, "selfsubjectaccessreviews"):
		_, _ = io.WriteString(w, `{"kind":"SelfSubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"allowed":true}}`)
	case len(parts) == 3:
		s.discover(w, parts[2])
	case r.Method == http.MethodPatch:
		s.patch(w, r, parts)
	case parts[len(parts)-1] != "podcertificaterequests":
		s.do(func() { s.show(w, parts[len(parts)-1]) })
	case r.URL.Query().Get("watch") != "":
		s.watch(w, r, parts[2])
	default:
		s.do(func() {
			items := []map[string]any{}
			for o := range maps.Values(s.objects) {
				items = append(items, o)
			}
			_ = json.NewEncoder(w).Encode(map[string]any{
				"kind": "PodCertificateRequestList", "apiVersion": "certificates.k8s.io/" + parts[2], "metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version)}, "items": items,
			})
		})
	}
}

func (s *apiServer) discover(w http.ResponseWriter, version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := map[string]any{"kind": "APIResourceList", "resources": []any{}}
	for _, v := range s.versions {
		if v == version {
			list["resources"] = []any{map[string]any{"name": "podcertificaterequests"}}
		}
	}
	_ = json.NewEncoder(w).Encode(list)
}

func (s *apiServer) show(w http.ResponseWriter, name string) {
	if o := s.objects[name]; o != nil {
		_ = json.NewEncoder(w).Encode(o)
		return
	}
	failure(w, http.StatusNotFound, "NotFound", name+" not found")
}

// failure answers as API servers do.
func failure(w http.ResponseWriter, code int, reason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code, "details": map[string]any{}})
}

// watch tells of all objects at each change, and of nothing at its beginning.
func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, version string) {
	if r.URL.Query().Get("sendInitialEvents") != "" {
		failure(w, http.StatusUnprocessableEntity, "Invalid", "no initial events here")
		return
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	seen, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	for {
		s.mu.Lock()
		for _, o := range s.objects {
			if at, _ := strconv.Atoi(o["metadata"].(map[string]any)["resourceVersion"].(string)); at > seen {
				o["apiVersion"], o["kind"] = "certificates.k8s.io/"+version, "PodCertificateRequest"
				_ = json.NewEncoder(w).Encode(map[string]any{"type": "MODIFIED", "object": o})
			}
		}
		seen = s.version
		changed := s.changed
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

func (s *apiServer) patch(w http.ResponseWriter, r *http.Request, parts []string) {
	name, status := parts[6], len(parts) == 8
	var body map[string]map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		failure(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, parts[2]+" "+path.Join(parts[5:]...))
	if s.before != nil && s.before(w, r) {
		return
	}
	old := s.objects[name]
	switch {
	case old == nil:
		s.show(w, name)
		return
	case body["metadata"]["resourceVersion"] != old["metadata"].(map[string]any)["resourceVersion"]:
		failure(w, http.StatusConflict, "Conflict", "it was changed")
		return
	}
	next := maps.Clone(old)
	meta := maps.Clone(old["metadata"].(map[string]any))
	if status {
		next["status"] = body["status"]
	} else {
		meta["annotations"] = body["metadata"]["annotations"]
	}
	next["metadata"] = meta
	s.put(next)
	if s.after == nil || !s.after(w, r) {
		s.show(w, name)
	}
}

// bench is a Signer between that API server and a real registration authority.
type bench struct {
	*apiServer
	*world.World
	t      *testing.T
	signer *Signer
}

func newBench(t *testing.T, versions ...string) *bench {
	t.Helper()
	b := &bench{t: t, World: world.New(t, ""), apiServer: newAPIServer(t, versions...)}
	id, err := attestor.NewIdentity(world.Cluster, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	b.Pods.Store(attestor.PodRef{Namespace: "shop", Name: "web-1", UID: "pod-web-1"}, attestor.Evidence{
		Proven: true, Identity: id, ServiceAccountUID: "sa-web", PodName: "web-1", PodUID: "pod-web-1", NodeName: "node1", NodeUID: "uid-node1",
	})
	b.signer, err = NewSigner(SignerOptions{
		Cluster: world.Cluster, Config: Config{PodCertificateRequests: true}, Connection: b.apiServer, Registration: b.RA, Replica: "ca-0",
		Log: slog.New(slog.DiscardHandler), Every: 20 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ask stores a kubelet's request.
func (b *bench) ask(name string) {
	b.t.Helper()
	b.do(func() {
		b.put(map[string]any{
			"kind": "PodCertificateRequest", "apiVersion": "certificates.k8s.io/v1beta1",
			"metadata": map[string]any{"namespace": "shop", "name": name, "uid": "uid-of-" + name},
			"spec": map[string]any{
				"signerName": DefaultName, "podName": "web-1", "podUID": "pod-web-1", "serviceAccountName": "web", "serviceAccountUID": "sa-web",
				"nodeName": "node1", "nodeUID": "uid-node1", "maxExpirationSeconds": 86400, "stubPKCS10Request": stub(b.t),
			},
		})
	})
}

// condition is the first of an object's, or empty.
func (b *bench) condition(name string) (kind, reason string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	status, _ := b.objects[name]["status"].(map[string]any)
	list, _ := status["conditions"].([]any)
	if len(list) == 0 {
		return "", ""
	}
	c := list[0].(map[string]any)
	return c["type"].(string), c["reason"].(string)
}

func (b *bench) signed() (n int) {
	b.t.Helper()
	err := b.Store.ScanLedger(b.t.Context(), func(e ca.LedgerEntry) (bool, error) {
		if e.Profile == ca.ProfileWorkload {
			n++
		}
		return true, nil
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

func (b *bench) await(check func() error) {
	b.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) until(name, want string) {
	b.t.Helper()
	b.await(func() error {
		if kind, reason := b.condition(name); kind != want {
			return fmt.Errorf("%s is %q (%s), want %q; %v", name, kind, reason, want, b.signer.Status())
		}
		return nil
	})
}
