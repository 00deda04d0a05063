package registration

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/attestor"
)

// whole is a decision of which each field has a value of its own, but those that are not remembered.
func whole(t *testing.T) Decision {
	t.Helper()
	identity, err := attestor.NewIdentity("one", "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	var fill func(v reflect.Value)
	fill = func(v reflect.Value) {
		for i := range v.NumField() {
			n++
			switch f := v.Field(i).Addr().Interface().(type) {
			case *string:
				*f = fmt.Sprintf("text %d: \x00\xffü", n)
			case *bool:
				*f = true
			case *time.Time:
				*f = time.Unix(int64(n)*1e9, int64(n))
			case *spiffeid.ID:
				*f = spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.test/%d", n))
			case *attestor.Identity:
				*f = identity
			case *Caller, *attestor.Evidence:
				fill(v.Field(i))
			case *error, **attestor.Facts: // not remembered
			default:
				t.Fatalf("a field of type %T: is it remembered?", f)
			}
		}
	}
	var d Decision
	fill(reflect.ValueOf(&d).Elem())
	return d
}

func TestADecisionIsRememberedWhole(t *testing.T) {
	full := whole(t)
	early := full
	early.Time, early.Message = time.Unix(-1, 999_999_999), strings.Repeat("long", 1000)
	for _, d := range []Decision{full, early, {}} {
		if got := decode(d.encode(nil)); !reflect.DeepEqual(got, d) {
			t.Errorf("got  %+v\nwant %+v", got, d)
		}
	}
	untrusted := full
	untrusted.Caller.Untrusted, untrusted.Evidence.Facts = fmt.Errorf("no"), &attestor.Facts{}
	if got := decode(untrusted.encode(nil)); !reflect.DeepEqual(got, full) {
		t.Errorf("got  %+v\nwant %+v", got, full)
	}
}

// The newest comes first also where the clock was set back, and whatever kind it is of.
func TestTheRingsOrderIsThatOfDecisions(t *testing.T) {
	r := NewRing(2)
	add := func(serial, outcome string, at int64) {
		d := whole(t)
		d.Evidence.PodName, d.Serial, d.Outcome, d.Time = "web-1", serial, outcome, time.Unix(at, 0)
		r.add(&d)
	}
	add("forgotten", OutcomeIssued, 900)
	add("first", OutcomeIssued, 1000)
	add("refused", "POLICY_DENIED", 50)
	add("last", OutcomeIssued, 60)
	var got []string
	for _, d := range r.ByPod("shop", "web-1", 10) {
		got = append(got, d.Serial)
	}
	if want := []string{"last", "refused", "first"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if since := r.Since(); since.Unix() != 1000 {
		t.Errorf("since %v", since)
	}
	if one := r.ByPod("shop", "web-1", 1); len(one) != 1 || one[0].Serial != "last" {
		t.Errorf("the newest: %+v", one)
	}
}

// The Ring is written for each SVID, and its places are taken again and again.
func TestARingThatIsFullTakesNoMoreMemory(t *testing.T) {
	r, d := NewRing(8), whole(t)
	for range 8 {
		r.add(&d)
	}
	if n := testing.AllocsPerRun(100, func() { r.add(&d) }); n != 0 {
		t.Errorf("%v allocations a decision", n)
	}
	long := d
	long.Message = strings.Repeat("x", 8<<10)
	for range 8 {
		r.add(&long)
	}
	for range 8 {
		r.add(&d)
	}
	for _, s := range r.kinds[1].slots {
		if cap(s.decided) > 1<<10 {
			t.Fatalf("a place holds %d bytes for %d", cap(s.decided), len(s.decided))
		}
	}
}

// Who asks is answered from what there was as he came, in pieces, between which others issue: the oldest make room for what they
// add, and are not found any more.
func TestTheRingIsSearchedWhileDecisionsAreMade(t *testing.T) {
	const size, more = 5 * looked, looked + 1
	r := NewRing(size)
	n := 0
	add := func(many int) {
		for range many {
			d := whole(t)
			d.Outcome, d.Evidence.PodName, d.Serial = OutcomeIssued, "web-1", strconv.Itoa(n)
			r.add(&d)
			n++
		}
	}
	add(2 * size)
	r.between = func() { add(more) } // would wait for ever if the lock were held
	found := r.ByPod("shop", "web-1", size)
	// After two pieces the places of 2*more are taken, and with the third it comes to them.
	if want := size - 2*more; len(found) != want {
		t.Errorf("%d are found, want %d", len(found), want)
	}
	for i, d := range found {
		if want := strconv.Itoa(2*size - 1 - i); d.Serial != want {
			t.Fatalf("%s is found at place %d, want %s", d.Serial, i, want)
		}
	}
	r.between = func() {}
	if all := r.ByPod("shop", "web-1", 2*size); len(all) != size || all[0].Serial != strconv.Itoa(n-1) {
		t.Errorf("%d are remembered, the newest is %s", len(all), all[0].Serial)
	}
}
