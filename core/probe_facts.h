/* The parts of `facts`, in the order in which they're printed. */
#ifndef RINGFENCE_PROBE_FACTS_H
#define RINGFENCE_PROBE_FACTS_H

#include "probe_json.h"

/* probe_facts.c: this process */
void facts_kernel(struct json *json);
void facts_ids(struct json *json);
void facts_security(struct json *json);
void facts_namespaces(struct json *json);
void facts_process(struct json *json);

/* probe_facts_system.c: what it sees around itself */
void facts_pids(struct json *json);
void facts_mounts(struct json *json);
void facts_network(struct json *json);
void facts_resources(struct json *json);
void facts_clocks(struct json *json);
void facts_identity(struct json *json);
void facts_devices(struct json *json);
void facts_ipc(struct json *json);
void facts_sensitive(struct json *json);

#endif
