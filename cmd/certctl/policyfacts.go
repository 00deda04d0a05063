package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/ca/policy"
)

// factFlags are what conditions are told of the pod.
type factFlags struct {
	pod, node                            string
	labels, annotations, namespaceLabels []string
}

// names of the flags, in the order in which help and errors say them.
var factFlagNames = [...]string{"pod", "node", "label", "annotation", "namespace-label"}

func (f *factFlags) on(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.pod, factFlagNames[0], "", "the `name` of the pod, for conditions (pod.name)")
	flags.StringVar(&f.node, factFlagNames[1], "", "the `name` of its node (node.name)")
	flags.StringArrayVar(&f.labels, factFlagNames[2], nil, "a label of the pod, `KEY=VALUE`; repeat it for more, \"\" for a pod without (pod.labels)")
	flags.StringArrayVar(&f.annotations, factFlagNames[3], nil, "an annotation of the pod, `KEY=VALUE`; likewise (pod.annotations)")
	flags.StringArrayVar(&f.namespaceLabels, factFlagNames[4], nil, "a label of its namespace, `KEY=VALUE`; likewise (ns.labels)")
}

// message is what the flags say; nil where none was given.
func (f *factFlags) message(cmd *cobra.Command) (*meshcav1.PolicyFacts, error) {
	given := slices.DeleteFunc(slices.Clone(factFlagNames[:]), func(name string) bool { return !cmd.Flags().Changed(name) })
	if len(given) == 0 {
		return nil, nil
	}
	m := &meshcav1.PolicyFacts{Pod: f.pod, Node: f.node}
	for _, set := range []struct {
		flag  string
		texts []string
		into  **meshcav1.Labels
	}{
		{factFlagNames[2], f.labels, &m.PodLabels}, {factFlagNames[3], f.annotations, &m.PodAnnotations}, {factFlagNames[4], f.namespaceLabels, &m.NamespaceLabels},
	} {
		if !slices.Contains(given, set.flag) {
			continue
		}
		entries := map[string]string{}
		for _, text := range set.texts {
			key, value, ok := strings.Cut(text, "=")
			if text == "" && len(set.texts) == 1 {
				break
			}
			if _, twice := entries[key]; !ok || key == "" || twice {
				return nil, usage("--%s %.64q is not KEY=VALUE, or its key was there before", set.flag, text)
			}
			entries[key] = value
		}
		*set.into = &meshcav1.Labels{Entries: entries}
	}
	return m, nil
}

// known puts what is told into an input.
func known(in policy.Input, f *meshcav1.PolicyFacts) policy.Input {
	entries := func(l *meshcav1.Labels) map[string]string {
		if l == nil {
			return nil
		}
		return l.GetEntries()
	}
	in.Pod, in.Node = f.GetPod(), f.GetNode()
	in.PodLabels, in.PodAnnotations, in.NamespaceLabels = entries(f.GetPodLabels()), entries(f.GetPodAnnotations()), entries(f.GetNamespaceLabels())
	return in
}

// drawFacts repeats what conditions were told.
func drawFacts(p *page, f *meshcav1.PolicyFacts) {
	if f == nil {
		return
	}
	var told []pair
	add := func(name, value string, given bool) {
		if given {
			told = append(told, pair{name, text(value)})
		}
	}
	add("pod", f.GetPod(), f.GetPod() != "")
	add("node", f.GetNode(), f.GetNode() != "")
	add("labels", spellLabels(f.GetPodLabels()), f.GetPodLabels() != nil)
	add("annotations", spellLabels(f.GetPodAnnotations()), f.GetPodAnnotations() != nil)
	add("namespace labels", spellLabels(f.GetNamespaceLabels()), f.GetNamespaceLabels() != nil)
	p.pairs(told...)
}

func spellLabels(l *meshcav1.Labels) string {
	if len(l.GetEntries()) == 0 {
		return "none"
	}
	var all []string
	for _, key := range slices.Sorted(maps.Keys(l.GetEntries())) {
		all = append(all, fmt.Sprintf("%s=%s", key, l.GetEntries()[key]))
	}
	return strings.Join(all, " ")
}
