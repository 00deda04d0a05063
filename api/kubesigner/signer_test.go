package kubesigner

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

func stub(t *testing.T) []byte { return world.CSR(t, world.NewKey(t), x509.CertificateRequest{}) }

// run has the signer work until the test, or the returned function, ends it.
func (b *bench) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); b.signer.Run(ctx) }()
	stop = func() { cancel(); <-ended }
	b.t.Cleanup(stop)
	return stop
}

func TestTheBestVersionIsSpoken(t *testing.T) {
	for want, served := range map[string][]string{"v1": {"v1beta1", "v1"}, "v1beta1": {"v1beta1"}} {
		b := newBench(t, served...)
		b.run()
		b.ask("one")
		b.until("one", "Issued")
		if b.signer.Status()[0].Version != want || len(b.asked) != 2 || b.asked[0] != want+" podcertificaterequests/one" || b.asked[1] != want+" podcertificaterequests/one/status" {
			t.Errorf("served %v: %+v, %v", served, b.signer.Status(), b.asked)
		}
	}
}

// An answer that failed is written again, the same one: nothing is signed twice. One that failed after it had taken effect
// is found there.
func TestAnAnswerThatFails(t *testing.T) {
	broken := func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/status") {
			return false
		}
		failure(w, http.StatusInternalServerError, "InternalError", "etcdserver: request timed out")
		return true
	}
	for name, arrange := range map[string]func(*apiServer, func(http.ResponseWriter, *http.Request) bool){
		"it failed":                           func(s *apiServer, f func(http.ResponseWriter, *http.Request) bool) { s.before = f },
		"it failed after it had taken effect": func(s *apiServer, f func(http.ResponseWriter, *http.Request) bool) { s.after = f },
		"it failed as we may not": func(s *apiServer, _ func(http.ResponseWriter, *http.Request) bool) {
			s.before = func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, "/status") {
					failure(w, http.StatusForbidden, "Forbidden", "not permitted to sign")
				}
				return strings.HasSuffix(r.URL.Path, "/status")
			}
		},
		"somebody else changed the object": func(s *apiServer, _ func(http.ResponseWriter, *http.Request) bool) {
			s.before = func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, "/status") {
					failure(w, http.StatusConflict, "Conflict", "it was changed")
				}
				return strings.HasSuffix(r.URL.Path, "/status")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, "v1beta1")
			tries := 0
			first := func(f func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
				if f == nil {
					return nil
				}
				return func(w http.ResponseWriter, r *http.Request) bool {
					if tries >= 2 || !f(w, r) {
						return false
					}
					tries++
					return true
				}
			}
			arrange(b.apiServer, broken)
			b.before, b.after = first(b.before), first(b.after)
			b.run()
			b.ask("one")
			b.until("one", "Issued")
			b.await(func() error {
				if n := b.signer.Status()[0].Pending; n != 0 {
					return fmt.Errorf("%d are open", n)
				}
				return nil
			})
			if n := b.signed(); n != 1 || tries == 0 {
				t.Errorf("it was signed %d times, after %d faults", n, tries)
			}
		})
	}
}

// An answer that the API server finds wrong is not made again and again, and is no answer of Denied.
func TestAnAnswerThatIsNotTaken(t *testing.T) {
	b := newBench(t, "v1beta1")
	b.before = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/status") {
			failure(w, http.StatusUnprocessableEntity, "Invalid", "notBefore is not near enough")
		}
		return strings.HasSuffix(r.URL.Path, "/status")
	}
	b.run()
	b.ask("one")
	b.await(func() error {
		if n := b.signed(); n != 1 {
			return fmt.Errorf("signed %d times", n)
		}
		return nil
	})
	time.Sleep(3 * time.Second) // in which a fault that passes would be tried again, twice at least
	if kind, _ := b.condition("one"); kind != "" || b.signed() != 1 {
		t.Errorf("it is %q, and was signed %d times", kind, b.signed())
	}
}

// Clocks that are too far apart are nobody's fault who asks, and nothing is signed that would not be taken.
func TestSkewedClocks(t *testing.T) {
	b := newBench(t, "v1beta1")
	b.do(func() { b.skew = -3 * time.Minute })
	b.run()
	b.ask("one")
	b.await(func() error {
		if !strings.Contains(b.Audit.String(), "CLOCK_SKEW") {
			return fmt.Errorf("no refusal: %s", b.Audit)
		}
		return nil
	})
	if kind, _ := b.condition("one"); kind != "" || b.signed() != 0 {
		t.Errorf("it is %q, and was signed %d times", kind, b.signed())
	}
	b.do(func() { b.skew = 90 * time.Second })
	b.until("one", "Issued")
}

// A pod that has had its share waits: kubelets take a Denied as final.
func TestAPodThatAsksTooOften(t *testing.T) {
	b := newBench(t, "v1beta1")
	pace, err := registration.NewPace(1)
	if err != nil {
		t.Fatal(err)
	}
	b.RA.Pace = pace
	b.run()
	b.ask("one")
	b.until("one", "Issued")
	b.ask("two")
	b.await(func() error {
		if !strings.Contains(b.Audit.String(), "POD_LIMIT") {
			return fmt.Errorf("no refusal: %s", b.Audit)
		}
		return nil
	})
	if kind, _ := b.condition("two"); kind != "" || b.signed() != 1 || b.signer.Status()[0].Pending != 1 {
		t.Errorf("it is %q, was signed %d times, and the door is %+v", kind, b.signed(), b.signer.Status())
	}
}

// An object that was made anew under the same name while the old one was in hand is answered too.
func TestAnObjectMadeAnew(t *testing.T) {
	b := newBench(t, "v1beta1")
	again := false
	b.after = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/status") && !again {
			again = true
			next := map[string]any{}
			for k, v := range b.objects["one"] {
				next[k] = v
			}
			delete(next, "status")
			next["metadata"] = map[string]any{"namespace": "shop", "name": "one", "uid": "uid-of-another"}
			b.put(next)
			b.mu.Unlock()
			time.Sleep(50 * time.Millisecond) // the watch tells of it before the answer comes
			b.mu.Lock()
		}
		return false
	}
	b.run()
	b.ask("one")
	b.await(func() error {
		if n := b.signed(); n != 2 {
			return fmt.Errorf("signed %d times", n)
		}
		return nil
	})
	b.until("one", "Issued")
}

// An object that is made anew does not wait for what the one before it of that name waits for: ten minutes, here.
func TestAnObjectMadeAnewWhileTheOldOneWaits(t *testing.T) {
	b := newBench(t, "v1beta1")
	b.before = func(w http.ResponseWriter, r *http.Request) bool {
		old := strings.HasSuffix(r.URL.Path, "/status") && b.objects["one"]["metadata"].(map[string]any)["uid"] == "uid-of-one"
		if old {
			failure(w, http.StatusUnprocessableEntity, "Invalid", "notBefore is not near enough")
		}
		return old
	}
	log := &logBook{}
	b.signer.doors[0].o.Log = slog.New(slog.NewTextHandler(log, nil))
	b.run()
	b.ask("one")
	b.await(func() error {
		if !strings.Contains(log.String(), "in=10m0s") {
			return fmt.Errorf("nothing waits: %s", log)
		}
		return nil
	})
	b.do(func() {
		next := maps.Clone(b.objects["one"])
		next["metadata"] = map[string]any{"namespace": "shop", "name": "one", "uid": "uid-of-another"}
		b.put(next)
	})
	b.until("one", "Issued")
	b.await(func() error {
		if n := b.signer.Status()[0].Pending; n != 0 {
			return fmt.Errorf("%d are open", n)
		}
		return nil
	})
}

func request(name string) *certificatesv1beta1.PodCertificateRequest {
	return &certificatesv1beta1.PodCertificateRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name)}, Spec: certificatesv1beta1.PodCertificateRequestSpec{SignerName: DefaultName, PodUID: types.UID(name)},
	}
}

// More requests than are kept are not forgotten.
func TestMoreThanIsKept(t *testing.T) {
	b := newBench(t, "v1beta1")
	d := b.signer.doors[0]
	other := request("other")
	other.Spec.SignerName = "other.example/x"
	if d.seen(other); d.status().Pending != 0 {
		t.Fatal("another signer's request is kept")
	}
	relisted := 0
	d.relist = func() { relisted++ }
	for i := range maxPending + 10 {
		d.seen(request(fmt.Sprint(i)))
	}
	if n := d.status().Pending; n != maxPending {
		t.Fatalf("%d are kept", n)
	}
	for i := range maxPending/2 + 1 {
		d.done(objectKey{"shop", fmt.Sprint(i)})
	}
	if relisted != 1 {
		t.Errorf("listed anew %d times", relisted)
	}
}

func TestASignerStopsWithWhatItHasInHand(t *testing.T) {
	b := newBench(t, "v1beta1")
	held, free := make(chan struct{}), make(chan struct{})
	b.before = func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "/status") {
			close(held)
			b.mu.Unlock()
			<-free
			b.mu.Lock()
		}
		return false
	}
	stop := b.run()
	b.ask("one")
	<-held
	ended := make(chan struct{})
	go func() { defer close(ended); stop() }()
	select {
	case <-ended:
		t.Fatal("it ended with a request in hand")
	case <-time.After(100 * time.Millisecond):
	}
	close(free)
	<-ended
	if kind, _ := b.condition("one"); kind != "Issued" {
		t.Errorf("it is %q", kind)
	}
}

func TestMetricsOfTwoClusters(t *testing.T) {
	b := newBench(t)
	other, err := NewSigner(SignerOptions{
		Cluster: world.Twin, Config: Config{PodCertificateRequests: true, CertificateSigningRequests: true}, Connection: b.apiServer, Registration: b.RA, Replica: "ca-0",
		Log: b.signer.doors[0].o.Log,
	})
	if err != nil {
		t.Fatal(err)
	}
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(b.signer, other)
	families, err := r.Gather()
	if err != nil || len(families) != 2 {
		t.Errorf("%v, %v", families, err)
	}
}
