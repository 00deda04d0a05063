package kubesigner

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// ofPod is a request of a pod.
func ofPod(pod string, i int) object {
	r := request(fmt.Sprintf("%s-%05d", pod, i))
	r.Spec.PodUID = types.UID(pod)
	return r
}

// One pod that has more open requests than all places together leaves the others theirs.
func TestOnePodTakesNobodysPlace(t *testing.T) {
	d := newBench(t, "v1beta1").signer.doors[0]
	for i := range maxPending + 10 {
		d.seen(ofPod("greedy", i))
	}
	d.seen(ofPod("other", 0))
	if n := d.status().Pending; n != maxPerOwner+1 {
		t.Errorf("%d are kept, want %d of the one pod and the other's", n, maxPerOwner)
	}
	for i := range maxPerOwner / 2 {
		if d.wanted {
			t.Fatalf("a list is wanted after %d", i)
		}
		d.done(objectKey{"shop", ofPod("greedy", i).GetName()})
	}
	if !d.wanted {
		t.Error("what had no place is forgotten")
	}
}

func TestPlacesAreGivenBack(t *testing.T) {
	d := newBench(t, "v1beta1").signer.doors[0]
	anew := ofPod("two", 0)
	anew.SetName(ofPod("one", 0).GetName()) // another pod's, under the name of the first
	anew.SetUID("anew")
	for _, o := range []object{ofPod("one", 0), ofPod("one", 1), anew} {
		d.seen(o)
	}
	if one, two := d.owners["shop/one"], d.owners["shop/two"]; one == nil || one.places != 1 || two == nil || two.places != 1 {
		t.Errorf("the places: %+v %+v", one, two)
	}
	for _, o := range []object{anew, ofPod("one", 1)} {
		key := objectKey{"shop", o.GetName()}
		d.up(key)
		d.done(key)
	}
	if len(d.items)+len(d.owners) > 0 {
		t.Errorf("left: %v %v", d.items, d.owners)
	}
}

// Of a pod that has had its share one request waits for more: the others have no place, no try and
// no audit line until it is through, and other pods are served.
func TestAPodAtItsLimitHoldsOnePlace(t *testing.T) {
	b := newBench(t, "v1beta1")
	b.conf.QPS = -1 // client-go's own bound of five calls a second is not what is tested
	pace, err := registration.NewPace(1)
	if err != nil {
		t.Fatal(err)
	}
	b.RA.Pace = pace
	id, err := attestor.NewIdentity(world.Cluster, "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	b.Pods.Store(attestor.PodRef{Namespace: "shop", Name: "web-2", UID: "pod-web-2"}, attestor.Evidence{
		Proven: true, Identity: id, ServiceAccountUID: "sa-web", PodName: "web-2", PodUID: "pod-web-2", NodeName: "node1", NodeUID: "uid-node1",
	})
	for i := range maxPerOwner {
		b.ask(fmt.Sprintf("greedy-%02d", i))
	}
	b.run()
	b.await(func() error {
		if s := b.signer.Status()[0]; b.signed() != 1 || s.Pending != 1 {
			return fmt.Errorf("%d are signed, and the door is %+v", b.signed(), s)
		}
		return nil
	})
	if n := strings.Count(b.Audit.String(), "POD_LIMIT"); n == 0 || n > workers {
		t.Errorf("%d audit lines of one pod's limit, want one for each that was in hand at most, %d", n, workers)
	}
	b.ask("other")
	b.do(func() {
		spec := b.objects["other"]["spec"].(map[string]any)
		spec["podName"], spec["podUID"] = "web-2", "pod-web-2"
		b.put(b.objects["other"])
	})
	b.until("other", "Issued")
}

// The one that waits may fail for another cause, or be through: then the others are listed again.
func TestAfterTheWaiterOthersHaveTheirTurn(t *testing.T) {
	for name, then := range map[string]func(*door, objectKey, *item){
		"it is through":                func(d *door, key objectKey, _ *item) { d.done(key) },
		"it waits for something else":  func(d *door, key objectKey, it *item) { d.limited(key, it, false) },
		"another takes its name":       func(d *door, _ objectKey, _ *item) { o := ofPod("greedy", 0); o.SetUID("anew"); d.seen(o) },
		"it waits still, and is asked": nil,
	} {
		t.Run(name, func(t *testing.T) {
			d := newBench(t, "v1beta1").signer.doors[0]
			keys := make([]objectKey, 2)
			for i := range keys {
				d.seen(ofPod("greedy", i))
				keys[i] = objectKey{"shop", ofPod("greedy", i).GetName()}
			}
			waiter := d.up(keys[0])
			if !d.limited(keys[0], waiter, true) || d.up(keys[1]) != nil || d.status().Pending != 1 {
				t.Fatalf("the door is %+v", d.status())
			}
			if d.seen(ofPod("greedy", 2)); d.status().Pending != 1 {
				t.Fatal("another of the pod's has a place beside the one that waits")
			}
			if then == nil {
				if d.up(keys[0]) != waiter || !d.limited(keys[0], waiter, true) || d.wanted {
					t.Error("the one that waits is not tried again")
				}
				return
			}
			if then(d, keys[0], waiter); !d.wanted {
				t.Error("those that were let go are forgotten")
			}
		})
	}
}

func TestListsForOwnersArePaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &door{relistEvery: relistEvery}
		round, stop := context.WithCancel(t.Context())
		defer stop()
		go d.relistWanted(round, stop)
		time.Sleep(10 * relistEvery)
		synctest.Wait()
		if round.Err() != nil {
			t.Fatal("it is listed for nobody")
		}
		d.mu.Lock()
		d.wanted = true
		d.mu.Unlock()
		time.Sleep(relistEvery)
		if synctest.Wait(); !errors.Is(round.Err(), context.Canceled) {
			t.Error("it is not listed again")
		}
	})
}

// What an owner had no place for has its turn when the others are through, though the watch tells of it no more.
func TestMoreThanAnOwnersPlacesAreAnswered(t *testing.T) {
	b := newBench(t, "v1beta1")
	var err error
	if b.RA.Pace, err = registration.NewPace(10 * maxPerOwner); err != nil {
		t.Fatal(err)
	}
	b.conf.QPS = -1 // no pace of the client's own
	b.signer.doors[0].relistEvery = 100 * time.Millisecond
	const most = maxPerOwner + 1
	for i := range most {
		b.ask(fmt.Sprint("volume-", i))
	}
	b.run()
	for i := range most {
		b.until(fmt.Sprint("volume-", i), "Issued")
	}
}

// What is stripped of a request leaves whose it is.
func TestWhoseASigningRequestIs(t *testing.T) {
	p := signingRequests("c", DefaultName)
	r := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "one"}, Spec: certificatesv1.CertificateSigningRequestSpec{
		Username: "system:serviceaccount:shop:web", Extra: map[string]certificatesv1.ExtraValue{extraPodUID: {"pod-web-1"}, extraPodName: {"web-1"}},
	}}
	p.strip(r)
	if got := p.owner(r); got != "system:serviceaccount:shop:web/pod-web-1" || len(r.Spec.Extra) != 1 {
		t.Errorf("%q, %v", got, r.Spec.Extra)
	}
}
