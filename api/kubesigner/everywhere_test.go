package kubesigner

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/client-go/rest"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/test/world"
)

// town is an API server's namespaces at the wire, each with one ConfigMap at most. test/kubesigner has a real one.
type town struct {
	*httptest.Server
	mu      sync.Mutex
	spaces  []string
	maps    map[string]map[string]any // by namespace
	version int
	// writing is asked at each write in a namespace; true: it has answered it.
	writing func(w http.ResponseWriter, namespace string) bool
	allowed bool
}

func (s *town) REST() (*rest.Config, *http.Client) { return &rest.Config{Host: s.URL}, s.Client() }
func (s *town) Doubt()                             {}
func (s *town) ClockSkew() time.Duration           { return 0 }

func (s *town) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/") // api v1 namespaces NAMESPACE configmaps NAME
	list := func(kind string, items []any) {
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": "1"}, "items": items})
	}
	switch {
	case p[len(p)-1] == "selfsubjectaccessreviews":
		_, _ = fmt.Fprintf(w, `{"kind":"SelfSubjectAccessReview","apiVersion":"authorization.k8s.io/v1","status":{"allowed":%v}}`, s.allowed)
	case p[len(p)-1] == "namespaces":
		var items []any
		for _, n := range s.spaces {
			items = append(items, map[string]any{"metadata": map[string]any{"name": n, "uid": "uid-" + n}})
		}
		list("NamespaceList", items)
	case len(p) == 3:
		var items []any
		for m := range maps.Values(s.maps) {
			items = append(items, m)
		}
		list("ConfigMapList", items)
	case r.Method != http.MethodGet:
		s.write(w, r, p[3])
	case s.maps[p[3]] != nil:
		_ = json.NewEncoder(w).Encode(s.maps[p[3]])
	default:
		failure(w, http.StatusNotFound, "NotFound", "there is none")
	}
}

func (s *town) write(w http.ResponseWriter, r *http.Request, namespace string) {
	var body map[string]any
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		failure(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	if s.writing != nil && s.writing(w, namespace) {
		return
	}
	s.version++
	meta := body["metadata"].(map[string]any)
	meta["name"], meta["namespace"], meta["resourceVersion"] = "istio-ca-root-cert", namespace, strconv.Itoa(s.version)
	s.maps[namespace] = body
	_ = json.NewEncoder(w).Encode(body)
}

// annotate changes what an object says of itself; "" takes an annotation off.
func (s *town) annotate(namespace, key, value string) {
	ann := s.maps[namespace]["metadata"].(map[string]any)["annotations"].(map[string]any)
	if ann[key] = value; value == "" {
		delete(ann, key)
	}
}

func (s *town) do(f func()) { s.mu.Lock(); defer s.mu.Unlock(); f() }

// crier publishes in every namespace of a town, one look at a time.
type crier struct {
	*town
	*Publisher
	t   *testing.T
	log *logBook
	b   *spiffebundle.Bundle
}

func newCrier(t *testing.T, sequence uint64) *crier {
	c := &crier{t: t, log: &logBook{}, town: &town{maps: map[string]map[string]any{}, spaces: []string{"default", "kube-system", "team-a"}, allowed: true}}
	c.Server = httptest.NewServer(c.town)
	t.Cleanup(c.Close)
	c.bundle(sequence)
	c.start()
	return c
}

// start is that of a CA, which remembers nothing of the one before.
func (c *crier) start() {
	c.t.Helper()
	var err error
	c.Publisher, err = NewPublisher(PublisherOptions{
		Cluster: "one", Config: PublishConfig{Istio: &EveryNamespaceConfig{}}, Signer: DefaultName, Connection: c.town,
		Bundle: func() (*spiffebundle.Bundle, <-chan struct{}) { return c.b, nil }, Hold: func() error { return nil },
		Log: slog.New(slog.NewTextHandler(io.MultiWriter(c.log, testLog{c.t}), nil)),
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// bundle makes the trust bundle another one.
func (c *crier) bundle(sequence uint64) {
	b := spiffebundle.New(spiffeid.RequireTrustDomainFromString("mesh.test"))
	b.SetSequenceNumber(sequence)
	key := world.NewKey(c.t)
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(sequence)), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		c.t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	b.AddX509Authority(root)
	c.b = b
}

// look publishes once, and returns what a rollout that waits for the current bundle is told.
func (c *crier) look() rollout.Publication {
	c.t.Helper()
	_ = c.publish(c.t.Context(), c.targets[0], c.b, nil)
	sequence, _ := c.b.SequenceNumber()
	all := c.Published(sequence)
	if len(all) != 1 {
		c.t.Fatalf("a rollout waits for %+v", all)
	}
	return all[0]
}

// Agents know what is published for them sooner than pods do, and a rollout waits for each as long as it takes.
func TestReadersHaveTheirOwnTime(t *testing.T) {
	p, err := NewPublisher(PublisherOptions{
		Cluster: "one", Config: PublishConfig{Agents: &ConfigMapConfig{}, Linkerd: &ConfigMapConfig{}, AgentsRefresh: metav1.Duration{Duration: 3 * time.Minute}},
		Signer: DefaultName, Connection: &town{}, Hold: func() error { return nil }, Log: slog.New(slog.DiscardHandler),
		Bundle: func() (*spiffebundle.Bundle, <-chan struct{}) { return nil, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]time.Duration{}
	for _, x := range p.Published(1) {
		got[x.Name] = x.Refresh
	}
	want := map[string]time.Duration{"one/configmap/meshca/meshca-trust": 3 * time.Minute, "one/configmap/linkerd/linkerd-identity-trust-roots": 10 * time.Minute}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// apart are the namespaces with trouble of their own, and what it is.
func (c *crier) apart() map[string]string {
	found := map[string]string{}
	for _, s := range c.Status() {
		if s.Apart {
			found[s.Name] = s.Fault
		}
	}
	return found
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// A namespace that is new has nobody who read anything older: no rollout begins its wait anew, and nobody tampered.
func TestANewNamespaceDelaysNothing(t *testing.T) {
	c := newCrier(t, 5)
	since := c.look().Since
	if since.IsZero() {
		t.Fatal("it is not published")
	}
	c.do(func() { c.spaces = append(c.spaces, "preview-1") })
	if now := c.look(); !now.Since.Equal(since) || now.Fault != "" {
		t.Errorf("since %s, and %+v with a new namespace", since, now)
	}
	if c.maps["preview-1"] == nil || strings.Contains(c.log.String(), "somebody else") || len(c.apart()) > 0 {
		t.Errorf("in the new namespace there is %v, and it is told %v\n%s", c.maps["preview-1"], c.apart(), c.log)
	}
	// Nor does one whose object was somebody else's, when it is handed over.
	c.do(func() {
		c.spaces = append(c.spaces, "preview-2")
		c.maps["preview-2"] = map[string]any{"data": map[string]any{"root-cert.pem": "theirs"}, "metadata": map[string]any{"namespace": "preview-2", "annotations": map[string]any{}}}
	})
	if now := c.look(); !now.Since.Equal(since) || len(c.apart()) != 1 {
		t.Errorf("since %s, and %+v, told %v", since, now, c.apart())
	}
	c.do(func() { c.annotate("preview-2", domainAnnotation, "mesh.test") })
	if now := c.look(); !now.Since.Equal(since) || len(c.apart()) != 0 {
		t.Errorf("since %s, and %+v when it was handed over, told %v", since, now, c.apart())
	}
	// Another bundle begins it anew, for all.
	c.bundle(6)
	if now := c.look(); !now.Since.After(since) {
		t.Errorf("the bundle 6 has been there since %s, the one before it since %s", now.Since, since)
	}
}

// Whatever a namespace's administrator does to the object there is told as that namespace's, and delays nobody.
func TestANamespacesOwnAffair(t *testing.T) {
	const theirs = "one/configmap/team-a/istio-ca-root-cert"
	quota := func(code int, reason string) func(*crier) {
		return func(c *crier) {
			delete(c.maps, "team-a")
			c.writing = func(w http.ResponseWriter, namespace string) bool {
				if namespace == "team-a" {
					failure(w, code, reason, "exceeded quota")
				}
				return namespace == "team-a"
			}
		}
	}
	for name, act := range map[string]struct {
		do   func(*crier)
		want string
		back bool // what is published comes there all the same
	}{
		"handed back":          {func(c *crier) { c.annotate("team-a", domainAnnotation, "") }, "somebody else's", false},
		"another trust domain": {func(c *crier) { c.annotate("team-a", domainAnnotation, "other.test") }, "other.test", false},
		"a number made up":     {func(c *crier) { c.annotate("team-a", sequenceAnnotation, "99999999") }, "somebody else changed it", true},
		"a quota":              {quota(http.StatusForbidden, "Forbidden"), "exceeded quota", false},
		"immutable":            {quota(http.StatusUnprocessableEntity, "Invalid"), "exceeded quota", false},
		"edited all the time":  {quota(http.StatusConflict, "Conflict"), "exceeded quota", false},
	} {
		for when, before := range map[string]func(*crier){
			"before a new root":   func(c *crier) { c.bundle(6) },
			"before a start":      func(c *crier) { c.start() },
			"under the same root": func(*crier) {},
		} {
			t.Run(name+" "+when, func(t *testing.T) {
				c := newCrier(t, 5)
				c.look()
				c.do(func() { act.do(c) })
				before(c)
				now := c.look()
				if now.Since.IsZero() || now.Fault != "" {
					t.Errorf("a rollout is told %+v", now)
				}
				if told := c.apart(); len(told) != 1 || !strings.Contains(told[theirs], act.want) {
					t.Errorf("it is told %v, want %q", told, act.want)
				}
				sequence, _ := c.b.SequenceNumber()
				for _, namespace := range []string{"default", "team-a"} {
					has := ""
					if m := c.maps[namespace]; m != nil {
						has, _ = m["metadata"].(map[string]any)["annotations"].(map[string]any)[sequenceAnnotation].(string)
					}
					if want := strconv.FormatUint(sequence, 10); (namespace == "default" || act.back) && has != want {
						t.Errorf("%s has the bundle %q, want %s", namespace, has, want)
					}
				}
			})
		}
	}
}

// Edits without end are put back without end, and told as what they are, once; nobody's time begins anew.
func TestEditsWithoutEnd(t *testing.T) {
	c := newCrier(t, 5)
	since := c.look().Since
	for i := range 5 {
		c.do(func() {
			if i == 4 {
				delete(c.maps, "team-a")
			} else {
				c.maps["team-a"]["data"] = map[string]any{"root-cert.pem": "the thief's"}
			}
		})
		if now := c.look(); !now.Since.Equal(since) || now.Fault != "" {
			t.Fatalf("after edit %d a rollout is told %+v", i, now)
		}
		if c.maps["team-a"]["data"].(map[string]any)["root-cert.pem"] == "the thief's" {
			t.Fatal("it was not put back")
		}
	}
	if told := c.apart()["one/configmap/team-a/istio-ca-root-cert"]; !strings.HasPrefix(told, "somebody else changed it, 5 times since ") {
		t.Errorf("it is told %q", told)
	}
	if n := strings.Count(c.log.String(), "level=WARN"); n != 1 {
		t.Errorf("the log has %d warnings\n%s", n, c.log)
	}
}

// However many namespaces have trouble, few are told by name.
func TestFewNamespacesAreNamed(t *testing.T) {
	c := newCrier(t, 5)
	for i := range 500 {
		c.spaces = append(c.spaces, fmt.Sprintf("tenant-%03d", i))
	}
	c.writing = func(w http.ResponseWriter, namespace string) bool {
		if strings.HasPrefix(namespace, "tenant-") {
			failure(w, http.StatusForbidden, "Forbidden", "exceeded quota")
		}
		return strings.HasPrefix(namespace, "tenant-")
	}
	if now := c.look(); now.Since.IsZero() {
		t.Errorf("a rollout is told %+v", now)
	}
	told := c.apart()
	if names := slices.Sorted(maps.Keys(told)); len(names) != apartTold+1 || !strings.HasPrefix(told[names[0]], "490 more namespaces") || !strings.HasSuffix(names[1], "/tenant-000/istio-ca-root-cert") {
		t.Errorf("%d are told: %q, %q", len(names), names, told[names[0]])
	}
	if n := strings.Count(c.log.String(), "level=WARN"); n != apartTold+1 {
		t.Errorf("the log has %d warnings", n)
	}
}

// What is no single namespace's affair holds a rollout: a CA without its rights, an API server with a fault.
func TestThePlacesOwnFaults(t *testing.T) {
	for name, act := range map[string]struct {
		do   func(*crier)
		want string
	}{
		"no right to patch": {func(c *crier) {
			c.allowed = false
			c.writing = func(w http.ResponseWriter, namespace string) bool {
				if namespace == "team-a" {
					failure(w, http.StatusForbidden, "Forbidden", "cannot patch")
				}
				return namespace == "team-a"
			}
		}, "may not patch configmaps istio-ca-root-cert in every namespace"},
		"a fault that passes": {func(c *crier) {
			c.writing = func(w http.ResponseWriter, namespace string) bool {
				if namespace == "team-a" {
					failure(w, http.StatusInternalServerError, "InternalError", "etcdserver: request timed out")
				}
				return namespace == "team-a"
			}
		}, "in 1 of 3 namespaces"},
		"refused everywhere": {func(c *crier) {
			c.writing = func(w http.ResponseWriter, _ string) bool {
				failure(w, http.StatusForbidden, "Forbidden", "a policy of the cluster")
				return true
			}
		}, "in 3 of 3 namespaces"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCrier(t, 5)
			before := c.look()
			c.do(func() { act.do(c) })
			c.bundle(6)
			if now := c.look(); !now.Since.IsZero() || !strings.Contains(now.Fault, act.want) {
				t.Errorf("a rollout is told %+v", now)
			}
			c.do(func() { c.writing, c.allowed = nil, true })
			if now := c.look(); !now.Since.After(before.Since) || now.Fault != "" {
				t.Errorf("when it had passed: %+v, before: %+v", now, before)
			}
		})
	}
}
