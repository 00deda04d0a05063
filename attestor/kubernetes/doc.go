// Package kubernetes attests workloads by their Kubernetes service-account tokens, one [Cluster] for each cluster.
//
// A token is proven in one of two ways. In mode tokenReview the API server is asked about each token; in mode jwks its
// signature is verified here, under the cluster's published keys. What was proven is then held against the cluster as it
// is now: namespace, service account, pod and node must all live, by UID. tokenReview reads them one by one; jwks goes by
// watches, and reads once more before it refuses, because a new pod's token can outrun the watch. In both modes the
// watches tell what has ended of what was attested before: see [Cluster.Ended].
//
// Nothing here decides what an attested workload may have: see ca/registration.
package kubernetes
