package kubesigner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// apartTold bounds the namespaces whose own trouble is told by name.
	apartTold = 10
	// editsTold is how long it is told that somebody else wrote what is published in a namespace.
	editsTold = time.Hour
)

// everywhere is one place with as many objects as the cluster has namespaces. Who administers a namespace can do anything to
// the object there, so whatever is wrong with it is that namespace's own affair: it is told, mended where it can be, and
// neither keeps the bundle from the other namespaces nor a rollout waiting.
//
// It asks no object for its sequence: in a namespace anybody can make one up. That the store is an old one is found out by
// the other places, and by agents.
type everywhere struct {
	p    *Publisher
	in   content
	name string

	// The rest is the place's loop's. held are the namespaces that held the bundle when they were last looked at, by UID;
	// edits is what others did there, by name.
	held  map[types.UID]bool
	edits map[string]edits
}

// edits are what somebody else did to the object of a namespace.
type edits struct {
	times       int
	first, last time.Time
}

func (p *Publisher) everyNamespace(c EveryNamespaceConfig) *target {
	e := &everywhere{p: p, in: inConfigMap(c.Key), name: c.Name, edits: map[string]edits{}}
	return &target{
		name: e.place("*"), put: e.put,
		follow: []func(context.Context, func()) error{
			func(ctx context.Context, wake func()) error {
				return p.changes(ctx, namespaces, objectKey{}, &corev1.Namespace{}, wake)
			},
			func(ctx context.Context, wake func()) error {
				return p.changes(ctx, configMaps, objectKey{name: c.Name}, &corev1.ConfigMap{}, wake)
			},
		},
	}
}

func (e *everywhere) place(namespace string) string {
	return fmt.Sprintf("%s/configmap/%s/%s", e.p.o.Cluster, namespace, e.name)
}

// put has an object in each namespace hold the bundle. Namespaces that are going are left out. What is made in a new
// namespace changes nothing for readers: nobody there has read anything older. Nor does what others edit, or delete.
func (e *everywhere) put(ctx context.Context, m material, had uint64) (outcome, error) {
	spaces, is, err := e.list(ctx)
	if err != nil {
		return outcome{}, err
	}
	var out outcome
	var failed, own []error
	held := make(map[types.UID]bool, len(spaces))
	for i := range spaces {
		s := &spaces[i]
		if ctx.Err() != nil {
			return out, ctx.Err()
		}
		has := is[s.Name]
		if has != nil && e.in.read(has) == m.pem && isMarked(has, m) {
			held[s.UID] = true
			continue
		}
		did, err := e.p.ensure(ctx, e.in, objectKey{s.Name, e.name}, m.pem, m, false)
		switch {
		case err == nil:
			held[s.UID] = true
		case apierrors.IsNotFound(err), apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		case ownAffair(err):
			own = append(own, err)
			out.apart = append(out.apart, Publication{Name: e.place(s.Name), Fault: refusal.Clip(err.Error(), 512), Apart: true})
		default:
			failed = append(failed, err)
		}
		switch again := had == m.sequence; {
		case did == nothing:
		case again && e.held[s.UID], has != nil && later(has, m):
			out.restored = true
			e.edited(s.Name)
		case did == created:
			out.written++
		case did == replaced && !again:
			out.changed = true
		}
	}
	e.held = held
	out.apart = e.told(out.apart, spaces)
	return out, e.fault(ctx, len(spaces), failed, own)
}

// list is the cluster's namespaces, and the objects that are there, by namespace.
func (e *everywhere) list(ctx context.Context) ([]corev1.Namespace, map[string]*corev1.ConfigMap, error) {
	var spaces corev1.NamespaceList
	var maps corev1.ConfigMapList
	fromCache := metav1.ListOptions{ResourceVersion: "0"}
	if err := e.p.api.list(ctx, namespaces, fromCache, &spaces); err != nil {
		return nil, nil, err
	}
	fromCache.FieldSelector = fields.OneTermEqualSelector("metadata.name", e.name).String()
	if err := e.p.api.list(ctx, configMaps, fromCache, &maps); err != nil {
		return nil, nil, err
	}
	is := make(map[string]*corev1.ConfigMap, len(maps.Items))
	for i := range maps.Items {
		is[maps.Items[i].Namespace] = &maps.Items[i]
	}
	live := slices.DeleteFunc(spaces.Items, func(s corev1.Namespace) bool { return s.DeletionTimestamp != nil })
	slices.SortFunc(live, func(a, b corev1.Namespace) int { return cmp.Compare(a.Name, b.Name) })
	return live, is, nil
}

// later reports whether an object says that it holds a later bundle than there is.
func later(has object, m material) bool {
	theirs, err := strconv.ParseUint(has.GetAnnotations()[sequenceAnnotation], 10, 64)
	return err == nil && theirs > m.sequence
}

// ownAffair reports whether a namespace's administrator can have brought about that its object could not be written: by an
// object that is not ours, cannot be changed (immutable), is full or changes all the time; by a quota, or a policy of his.
func ownAffair(err error) bool {
	return errors.Is(err, errNotOurs) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || apierrors.IsInvalid(err) ||
		apierrors.IsBadRequest(err) || apierrors.IsRequestEntityTooLargeError(err) || apierrors.IsForbidden(err)
}

// fault is that of the place as a whole: nobody knows, or it is the CA that may not. own are the faults of single namespaces;
// those that are forbidden are their own only if the CA has the right.
func (e *everywhere) fault(ctx context.Context, all int, failed, own []error) error {
	if len(own) == all {
		failed = append(failed, own...)
	}
	if at := slices.IndexFunc(own, apierrors.IsForbidden); at >= 0 && len(failed) == 0 {
		for _, need := range []right{{"patch", configMaps.plural, "", e.name}, {"create", configMaps.plural, "", ""}} {
			may, err := e.p.api.mayIn(ctx, configMaps.Group, need)
			switch {
			case err != nil:
				return fmt.Errorf("asking whether the CA may %s: %w", need, err)
			case !may:
				return fmt.Errorf("the CA's account may not %s in every namespace (docs/examples/kubernetes-signers-rights.yaml): %w", need, own[at])
			}
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("in %d of %d namespaces it could not be written, the first: %w", len(failed), all, failed[0])
}

// edited notes that somebody else wrote or deleted the object of a namespace.
func (e *everywhere) edited(namespace string) {
	now, x := time.Now(), e.edits[namespace]
	if x.times == 0 {
		x.first = now
	}
	x.times, x.last = x.times+1, now
	e.edits[namespace] = x
}

// told are the namespaces with trouble of their own, those without the bundle first, and not more than people read.
func (e *everywhere) told(without []Publication, spaces []corev1.Namespace) []Publication {
	edited := make(map[string]edits, len(e.edits))
	for i := range spaces {
		if x, ok := e.edits[spaces[i].Name]; ok && time.Since(x.last) < editsTold {
			edited[spaces[i].Name] = x
		}
	}
	e.edits = edited
	all := without
	for i := range spaces {
		name := e.place(spaces[i].Name)
		if x, ok := edited[spaces[i].Name]; ok && !slices.ContainsFunc(without, func(w Publication) bool { return w.Name == name }) {
			all = append(all, Publication{Name: name, Apart: true, Fault: fmt.Sprintf(
				"somebody else changed it, %d times since %s, the last time at %s; each time it was put back", x.times, stamp(x.first), stamp(x.last))})
		}
	}
	if more := len(all) - apartTold; more > 0 {
		all = append(all[:apartTold:apartTold], Publication{Name: e.place("*") + " (others)", Apart: true, Fault: fmt.Sprintf("%d more namespaces have trouble of their own", more)})
	}
	return all
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
