package kubernetes

import (
	"bytes"
	"crypto"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
)

// fakeServer is an API server at the wire: objects with reads, lists and watches, TokenReview as a real one answers it,
// keys. What it is told to do wrong, it does wrong.
type fakeServer struct {
	*httptest.Server
	t          testing.TB
	kubeconfig string

	mu       sync.Mutex
	objects  map[kind]map[name]runtime.Object
	watchers map[kind][]chan watchLine
	version  int
	keys     map[string]crypto.PublicKey // that it verifies tokens with, and publishes
	calls    map[string]int              // by "VERB path-kind"
	review   func(*authenticationv1.TokenReviewStatus)
	wrong    func(w http.ResponseWriter, r *http.Request) bool // answers instead, where it returns true
	mute     map[kind]bool                                     // objects change, and no watch says so
	denied   bool                                              // SelfSubjectAccessReviews
}

type watchLine struct {
	Type   string         `json:"type"`
	Object runtime.Object `json:"object"`
}

func newFakeServer(t testing.TB) *fakeServer {
	f := &fakeServer{
		t: t, version: 1, keys: map[string]crypto.PublicKey{}, calls: map[string]int{}, mute: map[kind]bool{},
		objects: map[kind]map[name]runtime.Object{}, watchers: map[kind][]chan watchLine{},
	}
	for k := range kinds {
		f.objects[k] = map[name]runtime.Object{}
	}
	f.Server = httptest.NewUnstartedServer(f)
	f.EnableHTTP2 = true
	f.StartTLS() // client-go shows its token to no server without TLS
	t.Cleanup(f.closeAll)
	f.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	f.writeKubeconfig(f.Server, "")
	return f
}

// writeKubeconfig replaces the kubeconfig by one that leads to this server, with this token.
func (f *fakeServer) writeKubeconfig(to *httptest.Server, token string) {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: to.Certificate().Raw})
	f.writeKubeconfigWith(map[string]any{"server": to.URL, "certificate-authority-data": ca}, map[string]any{"token": token})
}

func (f *fakeServer) writeKubeconfigWith(cluster, user map[string]any) {
	f.t.Helper()
	conf, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"contexts": []any{map[string]any{"name": "c", "context": map[string]string{"cluster": "c", "user": "u"}}},
		"clusters": []any{map[string]any{"name": "c", "cluster": cluster}}, "users": []any{map[string]any{"name": "u", "user": user}},
	})
	if err != nil {
		f.t.Fatal(err)
	}
	next := f.kubeconfig + ".new"
	if err := errors.Join(os.WriteFile(next, conf, 0o600), os.Rename(next, f.kubeconfig)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fakeServer) closeAll() {
	f.CloseClientConnections()
	f.Close()
}

// put makes or replaces an object, and tells the watches.
func (f *fakeServer) put(k kind, o runtime.Object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version++
	m := o.(metav1.ObjectMetaAccessor).GetObjectMeta()
	m.SetResourceVersion(fmt.Sprint(f.version))
	n := name{m.GetNamespace(), m.GetName()}
	event := "ADDED"
	if _, ok := f.objects[k][n]; ok {
		event = "MODIFIED"
	}
	f.objects[k][n] = o.DeepCopyObject()
	f.tell(k, watchLine{event, f.objects[k][n]})
}

func (f *fakeServer) remove(k kind, n name) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o, ok := f.objects[k][n]
	if !ok {
		f.t.Fatalf("no %s %s to remove", k, n)
	}
	f.version++
	delete(f.objects[k], n)
	o.(metav1.ObjectMetaAccessor).GetObjectMeta().SetResourceVersion(fmt.Sprint(f.version))
	f.tell(k, watchLine{"DELETED", o})
}

// bookmark has the watches on a kind say that all is as it was.
func (f *fakeServer) bookmark(k kind) {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := k.example()
	o.(metav1.ObjectMetaAccessor).GetObjectMeta().SetResourceVersion(fmt.Sprint(f.version))
	f.tell(k, watchLine{"BOOKMARK", o})
}

func (f *fakeServer) tell(k kind, line watchLine) {
	if f.mute[k] {
		return
	}
	line.Object = named(k, line.Object.DeepCopyObject())
	for _, w := range f.watchers[k] {
		w <- line
	}
}

func (f *fakeServer) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeServer) count(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body) // net/http tells of a client that went only once its request was read
	r.Body = io.NopCloser(bytes.NewReader(body))
	f.mu.Lock()
	wrong := f.wrong
	f.mu.Unlock()
	if wrong != nil && wrong(w, r) {
		return
	}
	path := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case r.URL.Path == "/.well-known/openid-configuration":
		f.note("discovery")
		answer(w, http.StatusOK, map[string]string{"issuer": testIssuer, "jwks_uri": "https://elsewhere.example/keys"})
	case r.URL.Path == "/openid/v1/jwks":
		f.note("jwks")
		answer(w, http.StatusOK, f.keySet())
	case r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews":
		f.note("tokenreviews")
		f.serveReview(w, r)
	case r.URL.Path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
		f.note("rights")
		var in authorizationv1.SelfSubjectAccessReview
		decode(f.t, r, &in)
		f.do(func() { in.Status.Allowed = !f.denied })
		in.TypeMeta = metav1.TypeMeta{APIVersion: "authorization.k8s.io/v1", Kind: "SelfSubjectAccessReview"}
		answer(w, http.StatusCreated, in)
	case len(path) == 3 && r.URL.Query().Get("watch") != "":
		f.serveWatch(w, r, kindOf(path[2]))
	case len(path) == 3:
		f.serveList(w, kindOf(path[2]))
	case len(path) == 4:
		f.serveObject(w, kindOf(path[2]), name{"", path[3]})
	case len(path) == 6:
		f.serveObject(w, kindOf(path[4]), name{path[3], path[5]})
	default:
		http.NotFound(w, r)
	}
}

func (f *fakeServer) note(call string) { f.do(func() { f.calls[call]++ }) }

func (f *fakeServer) serveObject(w http.ResponseWriter, k kind, n name) {
	f.note("get " + k.String())
	f.mu.Lock()
	o, ok := f.objects[k][n]
	f.mu.Unlock()
	if !ok {
		answer(w, http.StatusNotFound, metav1.Status{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: http.StatusNotFound,
			Reason: metav1.StatusReasonNotFound, Message: k.String() + " not found", Details: &metav1.StatusDetails{Name: n.name, Kind: k.String()},
		})
		return
	}
	answer(w, http.StatusOK, named(k, o.DeepCopyObject()))
}

func (f *fakeServer) serveList(w http.ResponseWriter, k kind) {
	f.note("list " + k.String())
	f.mu.Lock()
	defer f.mu.Unlock()
	items := []runtime.Object{}
	for _, o := range f.objects[k] {
		items = append(items, o.DeepCopyObject())
	}
	answer(w, http.StatusOK, map[string]any{
		"apiVersion": "v1", "kind": listKind(k), "metadata": map[string]string{"resourceVersion": fmt.Sprint(f.version)}, "items": items,
	})
}

func (f *fakeServer) serveWatch(w http.ResponseWriter, r *http.Request, k kind) {
	if r.URL.Query().Get("sendInitialEvents") != "" { // as an API server before 1.32 does
		answer(w, http.StatusUnprocessableEntity, metav1.Status{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity,
			Reason: metav1.StatusReasonInvalid, Message: "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
		})
		return
	}
	f.note("watch " + k.String())
	lines := make(chan watchLine, 1000)
	f.do(func() { f.watchers[k] = append(f.watchers[k], lines) })
	defer f.do(func() {
		f.watchers[k] = slices.DeleteFunc(f.watchers[k], func(c chan watchLine) bool { return c == lines })
	})
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case line := <-lines:
			if json.NewEncoder(w).Encode(line) != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
	}
}

// serveReview answers as kube-apiserver does: see k8s.io/kubernetes/pkg/serviceaccount.
func (f *fakeServer) serveReview(w http.ResponseWriter, r *http.Request) {
	var in authenticationv1.TokenReview
	decode(f.t, r, &in)
	out := authenticationv1.TokenReview{TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}}
	f.mu.Lock()
	defer f.mu.Unlock()
	s := &out.Status
	if c, err := f.authenticate(in.Spec.Token); err != nil {
		s.Error = "[invalid bearer token, " + err.Error() + "]"
	} else {
		for _, a := range in.Spec.Audiences {
			if slices.Contains(c.Audience, a) {
				s.Audiences = append(s.Audiences, a)
			}
		}
		k := &c.Kubernetes
		s.Authenticated = len(s.Audiences) > 0
		s.User = authenticationv1.UserInfo{Username: "system:serviceaccount:" + k.Namespace + ":" + k.ServiceAccount.Name, UID: k.ServiceAccount.UID,
			Extra: map[string]authenticationv1.ExtraValue{extraCredentialID: {"JTI=" + c.ID}}}
		for key, value := range map[string]string{extraPodName: k.Pod.Name, extraPodUID: k.Pod.UID, extraNodeName: k.Node.Name, extraNodeUID: k.Node.UID} {
			if value != "" {
				s.User.Extra[key] = authenticationv1.ExtraValue{value}
			}
		}
	}
	if f.review != nil {
		f.review(s)
	}
	answer(w, http.StatusCreated, out)
}

// authenticate verifies with go-jose, so that the fake shares nothing with what it tests.
func (f *fakeServer) authenticate(token string) (*claims, error) {
	signed, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.ES256, jose.ES384, jose.ES512})
	if err != nil {
		return nil, err
	}
	key, ok := f.keys[signed.Signatures[0].Header.KeyID]
	if !ok {
		return nil, fmt.Errorf("no key")
	}
	payload, err := signed.Verify(key)
	if err != nil {
		return nil, err
	}
	var c claims
	if err := json.Unmarshal(payload, &c); err != nil {
		return nil, err
	}
	if _, ok := f.objects[pods][name{c.Kubernetes.Namespace, c.Kubernetes.Pod.Name}]; !ok && c.Kubernetes.Pod.Name != "" {
		return nil, fmt.Errorf("service account token has been invalidated")
	}
	return &c, nil
}

func (f *fakeServer) keySet() jose.JSONWebKeySet {
	f.mu.Lock()
	defer f.mu.Unlock()
	var set jose.JSONWebKeySet
	for id, key := range f.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: id, Use: "sig"})
	}
	return set
}

func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

func decode(t testing.TB, r *http.Request, into runtime.Object) {
	scheme := runtime.NewScheme()
	_ = authenticationv1.AddToScheme(scheme)
	_ = authorizationv1.AddToScheme(scheme)
	body, err := io.ReadAll(r.Body)
	if err == nil {
		err = runtime.DecodeInto(serializer.NewCodecFactory(scheme).UniversalDeserializer(), body, into)
	}
	if err != nil {
		t.Errorf("%s: %v", r.URL.Path, err)
	}
}

func kindOf(resource string) kind {
	for k := range kinds {
		if k.String() == resource {
			return k
		}
	}
	return kinds
}

func listKind(k kind) string {
	return [kinds]string{"NamespaceList", "ServiceAccountList", "PodList", "NodeList"}[k]
}

func named(k kind, o runtime.Object) runtime.Object {
	o.GetObjectKind().SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind(strings.TrimSuffix(listKind(k), "List")))
	return o
}

// The objects of the usual token.
func meta(namespace, n, uid string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: n, UID: types.UID(uid)}
}

func aPod(change func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta("shop", "web-1", "pod-uid"), Spec: corev1.PodSpec{NodeName: "node-1"}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	if change != nil {
		change(p)
	}
	return p
}

func (f *fakeServer) putUsual() {
	f.put(namespaces, &corev1.Namespace{ObjectMeta: meta("", "shop", "ns-uid")})
	f.put(serviceAccounts, &corev1.ServiceAccount{ObjectMeta: meta("shop", "web", "sa-uid")})
	f.put(nodes, &corev1.Node{ObjectMeta: meta("", "node-1", "node-uid")})
	f.put(pods, aPod(nil))
}

func deletedAt(at time.Time) *metav1.Time { t := metav1.NewTime(at); return &t }
